"""What the middleware makes of the manager's answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import pytest

from rcon_plugins.errors import (
    ConcurrencyLimitExceeded,
    ConfinementError,
    KernelError,
    LimitExceeded,
    PidsLimitExceeded,
    RconError,
)
from rcon_plugins.outcome import Outcome
from rcon_wsgi import ConfineMiddleware
from tests.contract.wsgi.double import Manager
from tests.unit.wsgi.peer import environ_of


def app(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ran"]


class Answer:
    def __init__(self, middleware: ConfineMiddleware, **environ: Any) -> None:
        self.status = ""
        self.headers: dict[str, str] = {}
        self.exc_info: Any = None
        result = middleware(environ_of(**environ), self._start_response)
        try:
            self.body = b"".join(result)
        finally:
            if hasattr(result, "close"):
                result.close()

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Any:
        self.status, self.headers, self.exc_info = status, dict(headers), exc_info


def middleware(manager: Any, application: Any = app) -> ConfineMiddleware:
    return ConfineMiddleware(application, manager=manager)


def inline() -> Manager:
    manager = Manager("inline")
    manager.start(lambda channel, frame: None)
    return manager


def busy() -> RconError:
    error = ConcurrencyLimitExceeded("8 are under way", policy="tenant", key="a.example", limit="concurrency")
    error.retry_after = 7
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfinementError("/sys/fs/cgroup/secret could not be written"), {"type": "refused"}),
        (KernelError("no", path="/sys/fs/cgroup/secret"), {"type": "refused"}),
        (busy(), {"type": "concurrency", "policy": "tenant", "limit": "concurrency"}),
        (
            PidsLimitExceeded("16 are running", policy="tenant", key="a.example", limit="pids"),
            {"type": "pids", "policy": "tenant", "limit": "pids"},
        ),
        (
            LimitExceeded("a plugin's own", policy="tenant", limit="quota"),
            {"type": "refused", "policy": "tenant", "limit": "quota"},
        ),
    ],
)
def test_a_request_that_the_manager_refuses_does_not_run(error: RconError, expected: dict[str, str]) -> None:
    manager = inline()
    manager.refuse = error
    answer = Answer(middleware(manager))
    body = json.loads(answer.body)
    assert answer.status == "503 Service Unavailable"
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert body["type"] == f"urn:problem-type:rcon:{expected['type']}"
    assert {name: body.get(name) for name in ("policy", "limit")} == {
        name: expected.get(name) for name in ("policy", "limit")
    }
    assert b"secret" not in answer.body
    assert b"a.example" not in answer.body
    assert answer.headers.get("Retry-After") == ("7" if expected["type"] == "concurrency" else None)


def test_a_request_that_the_settings_allow_runs_unconfined() -> None:
    class Allows:
        def admit(self, work: object) -> None:
            return None

    assert Answer(middleware(Allows())).body == b"ran"


def test_a_fork_of_the_process_it_was_made_in_refuses(in_child: Any) -> None:
    confined = middleware(inline())
    assert Answer(confined).body == b"ran"

    def ask() -> tuple[int, str]:
        return os.getpid(), Answer(confined).status

    child, status = in_child(ask)
    assert child != os.getpid()
    assert status == "503 Service Unavailable"


def test_settings_or_a_manager() -> None:
    with pytest.raises(TypeError, match="needs settings"):
        ConfineMiddleware(app)


def test_inline_runs_inside_each_time_and_only_then() -> None:
    manager = inline()
    seen: list[tuple[str, int]] = []

    class Body:
        def __iter__(self) -> Any:
            seen.append(("iter", manager.inside))
            for chunk in (b"one", b"two"):
                seen.append(("next", manager.inside))
                yield chunk

        def close(self) -> None:
            seen.append(("close", manager.inside))

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        seen.append(("call", manager.inside))
        start_response("200 OK", [])
        return Body()

    result = middleware(manager, application)(environ_of(), lambda *_: lambda _: None)
    for _ in result:
        assert manager.inside == 0  # the server writes outside
    result.close()  # type: ignore[attr-defined]
    assert seen == [("call", 1), ("iter", 1), ("next", 1), ("next", 1), ("close", 1)]
    assert [outcome.ending for outcome in manager.outcomes] == ["ok"]


def test_inline_closed_early_is_aborted() -> None:
    manager = inline()

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b"one"
        yield b"two"

    result: Any = middleware(manager, application)(environ_of(), lambda *_: lambda _: None)
    next(iter(result))
    result.close()
    assert [outcome.ending for outcome in manager.outcomes] == ["aborted"]


@pytest.mark.parametrize("where", ["call", "next", "close"])
def test_inline_errors_come_out_as_they_are(where: str) -> None:
    manager = inline()
    error = LookupError(where)

    class Body:
        def __iter__(self) -> Any:
            if where == "next":
                raise error
            yield b"one"

        def close(self) -> None:
            if where == "close":
                raise error

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        if where == "call":
            raise error
        return Body()

    with pytest.raises(LookupError) as caught:
        Answer(middleware(manager, application))
    assert caught.value is error
    assert [outcome.ending for outcome in manager.outcomes] == ["error"]
    assert manager.inside == 0


def test_inline_work_that_failed_at_a_limit_is_a_problem() -> None:
    manager = inline()
    manager.verdict = lambda outcome: Outcome(ending="pids", policy="tenant", limit="pids")

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        raise BlockingIOError("fork")

    answer = Answer(middleware(manager, application))
    assert json.loads(answer.body)["limit"] == "pids"
    assert answer.exc_info[0] is BlockingIOError  # or the server would take a second start_response amiss


def test_inline_work_that_cannot_enter_does_not_run() -> None:
    ran: list[bool] = []

    class CannotEnter(Manager):
        def admit(self, work: Any) -> Any:
            admission = super().admit(work)

            def entered() -> Any:
                raise KernelError("no", path="tasks")

            admission.entered = entered
            return admission

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        ran.append(True)
        return []

    manager = CannotEnter("inline")
    manager.start(lambda channel, frame: None)
    answer = Answer(middleware(manager, application))
    assert answer.status == "503 Service Unavailable"
    assert json.loads(answer.body)["policy"] == "double"
    assert ran == []
    assert [outcome.ending for outcome in manager.outcomes] == ["refused"]  # the log has a line
