"""A request run in this process: in the thread that serves it, or in one that is confined for good.

Each call into the application - itself, its iterable, its ``close`` - is made inside of the confinement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rcon_plugins.errors import RconError
from rcon_plugins.outcome import Outcome
from rcon_wsgi import problem

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication

    from rcon_plugins.confinement.admission import LocalAdmission


def run(
    app: WSGIApplication,
    environ: dict[str, Any],
    start_response: StartResponse,
    admission: LocalAdmission,
) -> Iterable[bytes]:
    """Call the application inside the confinement; its iterable enters it again for each chunk."""
    try:
        result = admission.call(app, environ, start_response)
    except BaseException as error:
        if not admission.ran and isinstance(error, RconError):
            admission.abort(str(error))
            return problem.respond(
                environ, start_response, Outcome(ending="refused", policy=admission.policy.name)
            )
        outcome = admission.finish("error", _detail(error))
        if outcome.ran_into_limit and isinstance(error, Exception):
            return problem.respond(environ, start_response, outcome, replacing=True)
        raise
    kind = type(result)
    if kind is list or kind is tuple:
        admission.finish("ok")
        return result
    if hasattr(result, "__len__"):
        return _SizedResponse(result, admission)
    return _Response(result, admission)


class _Response:
    """The application's iterable, confined whenever it runs."""

    def __init__(self, result: Iterable[bytes], admission: LocalAdmission) -> None:
        self._result = result
        self._admission = admission
        self._iterator: Iterator[bytes] | None = None
        self._exhausted = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return self._admission.call(self._next)
        except StopIteration:
            self._exhausted = True
            raise
        except BaseException as error:
            self._admission.finish("error", _detail(error))
            raise

    def close(self) -> None:
        """Close the application's iterable, and settle the work."""
        close = getattr(self._result, "close", None)
        if close is not None:
            try:
                self._admission.call(close)
            except BaseException as error:
                self._admission.finish("error", _detail(error))
                raise
        if self._exhausted:
            self._admission.finish("ok")
        else:
            self._admission.abort("the response was closed before its end: the client went away")

    def _next(self) -> bytes:
        if self._iterator is None:
            self._iterator = iter(self._result)
        return next(self._iterator)


class _SizedResponse(_Response):
    """One whose length is known, which a server may derive Content-Length from."""

    def __len__(self) -> int:
        return len(self._result)  # type: ignore[arg-type]


def _detail(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
