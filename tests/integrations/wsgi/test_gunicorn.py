"""Under gunicorn, in each worker class, a client cannot tell that the application is confined."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.contract.wsgi.apps import CASES
from tests.contract.wsgi.client import Served, ask, comparable, descendants, request_of, serving

SETTINGS = """
[policy.default]
memory = "256M"
isolation = "process"
"""
WORKERS = ("sync", "gthread", "gevent")
Serve = Callable[[str, bool], Served]


@contextmanager
def gunicorn(folder: Path, worker: str, *, confined: bool) -> Iterator[Served]:
    settings = folder / "rcon.toml"
    settings.write_text(SETTINGS)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    arguments = ["--bind", f"fd://{listener.fileno()}", "-k", worker, "--no-control-socket"]
    arguments += ["--config", "python:rcon_gunicorn.conf"] if confined else []
    arguments += ["--threads", "2"] if worker == "gthread" else []
    with (
        listener,
        serving(
            folder / "log",
            "gunicorn",
            *arguments,
            "tests.contract.wsgi.apps:by_path",
            port=port,
            environment={"RCON_SETTINGS": str(settings), "PYTHONWARNINGS": "default"},
            pass_fds=(listener.fileno(),),
        ) as served,
    ):
        yield served


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    started: dict[tuple[str, bool], Served] = {}
    with ExitStack() as stack:

        def get(worker: str, confined: bool) -> Served:
            if (worker, confined) not in started:
                folder = tmp_path_factory.mktemp(worker)
                started[worker, confined] = stack.enter_context(gunicorn(folder, worker, confined=confined))
            return started[worker, confined]

        yield get


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "gunicorn" in case.servers])
@pytest.mark.parametrize("worker", WORKERS)
def test_answers_are_the_same(serve: Serve, worker: str, name: str) -> None:
    case = CASES[name]
    request = request_of(name, case)
    confined = comparable(ask(serve(worker, True), request), framing=case.framing)
    assert confined == comparable(ask(serve(worker, False), request), framing=case.framing)


@pytest.mark.parametrize("worker", WORKERS)
def test_the_confined_server_has_executor_processes(serve: Serve, worker: str) -> None:
    """Or the same answers would be no wonder."""
    served = serve(worker, True)
    ask(served, request_of("hello", CASES["hello"]))
    assert len(descendants(served.process.pid)) >= 4  # master, worker, fork server, executor
    assert len(descendants(serve(worker, False).process.pid)) == 2
