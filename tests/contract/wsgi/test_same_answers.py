"""A client gets the same answers from an application confined inline, in a thread, in a process, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.contract.wsgi.apps import CASES
from tests.contract.wsgi.client import Served, ask, comparable, request_of, serving

Serve = Callable[[str, str], Served]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Return a function that returns a server in a mode, started on first use."""
    folder: Path = tmp_path_factory.mktemp("servers")
    started: dict[tuple[str, str], Served] = {}
    with ExitStack() as stack:

        def get(server: str, mode: str) -> Served:
            if (server, mode) not in started:
                log = folder / f"{server}-{mode}.log"
                started[server, mode] = stack.enter_context(
                    serving(log, "tests.contract.wsgi.serve", server, mode)
                )
            return started[server, mode]

        yield get


@pytest.fixture(scope="module")
def ask_directly(serve: Serve) -> Callable[[str, str, str], bytes]:
    """Return a function that returns the answer of an unconfined server to a case. It asks each once."""

    @cache
    def answer(server: str, mode: str, name: str) -> bytes:
        return ask(serve(server, mode), request_of(name, CASES[name]))

    return answer


ALL = [(server, name) for name, case in CASES.items() for server in case.servers]


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
@pytest.mark.parametrize(("server", "name"), ALL)
def test_answers_are_the_same(
    serve: Serve, ask_directly: Callable[[str, str, str], bytes], server: str, name: str, mode: str
) -> None:
    case = CASES[name]
    direct = ask_directly(server, "direct", name)
    confined = ask(serve(server, mode), request_of(name, case))
    assert direct
    assert comparable(confined, framing=case.framing) == comparable(direct, framing=case.framing)


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
@pytest.mark.parametrize(("server", "name"), [(server, name) for server, name in ALL if CASES[name].valid])
def test_nothing_for_the_validator_to_complain_about(
    serve: Serve, ask_directly: Callable[[str, str, str], bytes], server: str, name: str, mode: str
) -> None:
    """wsgiref.validate checks between server and middleware, and between middleware and application."""
    case = CASES[name]
    direct = ask_directly(server, "direct-validated", name)
    served = serve(server, f"{mode}-validated")
    confined = ask(served, request_of(name, case))
    assert comparable(confined, framing=case.framing) == comparable(direct, framing=case.framing)
    assert "AssertionError" not in served.log.read_text()


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
@pytest.mark.parametrize("server", ["wsgiref", "gunicorn"])
def test_text_that_the_application_logs_is_in_the_servers_log(serve: Serve, server: str, mode: str) -> None:
    served = serve(server, mode)
    ask(served, request_of("streams", CASES["streams"]))
    owner = "[double] " if mode == "process" else ""
    assert served.log_has(f"{owner}<errors: caf\u00e9 and more>\n{owner}<errors without an end>")


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
@pytest.mark.parametrize("server", ["wsgiref", "gunicorn"])
@pytest.mark.parametrize("name", ["error-at-once", "error-in-the-stream", "error-in-close"])
def test_the_applications_errors_are_in_the_servers_log(
    serve: Serve, server: str, name: str, mode: str
) -> None:
    served = serve(server, mode)
    ask(served, request_of(name, CASES[name]))
    where = {
        "error-at-once": "failed at once",
        "error-in-the-stream": "failed in the stream",
        "error-in-close": "failed in close()",
    }[name]
    assert served.log_has(f"LookupError: the application {where}")
    assert served.log_has("apps.py")  # the application's traceback, not only ours


@pytest.mark.parametrize("name", ["error-in-the-stream", "exc-info-after-headers"])
def test_a_response_that_fails_is_cut(serve: Serve, name: str) -> None:
    """The comparison with the server alone depends on this: the server cuts such a response off."""
    answer = ask(serve("gunicorn", "process"), request_of(name, CASES[name]))
    assert b"\r\nbegun" in answer
    assert not answer.endswith(b"0\r\n\r\n")
