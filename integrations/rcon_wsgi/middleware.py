"""The middleware: admit each request, and run the application in this process or in an executor process.

In this process, each call into the application is made inside the confinement: the application itself, its iterable,
and its ``close``.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rcon_plugins.confinement.admission import LocalAdmission, ProcessAdmission
from rcon_plugins.confinement.isolation import Server
from rcon_plugins.confinement.manager import Manager
from rcon_plugins.confinement.running import RunningManager
from rcon_plugins.errors import IdentityRefused, LimitExceeded, RconError, Unroutable
from rcon_plugins.outcome import Outcome
from rcon_plugins.settings.file import Settings, load
from rcon_wsgi.exchange import Exchange
from rcon_wsgi.request import respond, respond_refused, work_of
from rcon_wsgi.service import WsgiService

if TYPE_CHECKING:
    import socket

    from _typeshed.wsgi import StartResponse, WSGIApplication

_log = logging.getLogger("rcon.wsgi")


class ConfineMiddleware:
    """A WSGI application that confines another: each request gets the policy that the settings name for it.

    Construct it after the application is loaded, in the process that serves, before that starts threads. Without a
    ``manager`` it makes its own and forks the fork server immediately. If a server loads the application and *then*
    forks its workers, they would share one fork server: the middleware detects that and answers 503. Use the server's
    adapter in that case, or turn preloading off.

    :param app: the application.
    :param settings: `Settings`, or the path of a policy file.
    :param manager: a `RunningManager`, started in this process with ``WsgiService(app)``. Its starter closes it.
    :param server: the traits of the server that decide how requests can be confined, for the middleware's own manager.
        The default is the safe one: other threads serve, too.
    :param client_socket: returns the client's socket for an environ, or None. With it, a request whose client has
        closed the connection (or its half of it, as nginx does) is stopped even while it writes nothing. A response
        that must be cut off resets the connection by closing the socket. At the deadline the socket is shut down if
        the server waits for the client. Do not use it for connections that carry several requests at once, or if
        gevent has replaced ``select.poll``.
    :raises SettingsError: the settings are wrong, or this machine cannot enforce them.
    :raises KernelError: no part of the cgroup tree can be used.
    """

    def __init__(
        self,
        app: WSGIApplication,
        settings: Settings | str | os.PathLike[str] | None = None,
        *,
        manager: RunningManager | None = None,
        server: Server | None = None,
        client_socket: Callable[[dict[str, Any]], socket.socket | None] | None = None,
    ) -> None:
        self._app = app
        self._client_socket = client_socket
        self._owner = os.getpid()
        self._owns_manager = manager is None
        if manager is None:
            manager = _own_manager(app, settings, server)
            atexit.register(self.close)
        self._manager = manager

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request, confined."""
        if os.getpid() != self._owner:
            _log.error(
                "rcon: requests are refused: this process (%d) was forked after process %d made the middleware; "
                "make it in the process that serves, or use the adapter of the server",
                os.getpid(),
                self._owner,
            )
            return respond(environ, start_response, work_of(environ), Outcome(ending="refused"))
        client = self._client_socket(environ) if self._client_socket is not None else None
        work = work_of(environ)
        try:
            admission = self._manager.admit(work)
        except LimitExceeded as error:
            return respond_refused(environ, start_response, work, error)
        except IdentityRefused:
            return respond(environ, start_response, work, Outcome(ending="forbidden"))
        except Unroutable:
            status = self._manager.plan.settings.unmatched_status
            return respond(environ, start_response, work, Outcome(ending="unroutable"), status=status)
        except RconError:  # the manager has reported it to hooks and log
            return respond(environ, start_response, work, Outcome(ending="refused"))
        if admission is None:
            return self._app(environ, start_response)
        if isinstance(admission, ProcessAdmission):
            return Exchange(environ, admission, client).begin(start_response)
        return _run_here(self._app, environ, start_response, admission)

    def close(self) -> None:
        """Close the manager if the middleware made it. Also called at process exit. Nothing is served after it."""
        if self._owns_manager and os.getpid() == self._owner:
            self._manager.close()


def _own_manager(
    app: WSGIApplication, settings: Settings | str | os.PathLike[str] | None, server: Server | None
) -> RunningManager:
    if settings is None:
        raise TypeError("ConfineMiddleware needs settings, or a manager")
    if not isinstance(settings, Settings):
        settings = load(os.fspath(settings))
    return Manager(settings, server=server).start(WsgiService(app))


def _run_here(
    app: WSGIApplication,
    environ: dict[str, Any],
    start_response: StartResponse,
    admission: LocalAdmission,
) -> Iterable[bytes]:
    """Call the application inside the confinement. Its iterable enters it again for each chunk."""
    try:
        result = admission.call(app, environ, start_response)
    except BaseException as error:
        if not admission.ran and isinstance(error, RconError):
            return respond(environ, start_response, admission.work, admission.refuse(str(error)))
        outcome = admission.finish("error", _detail(error))
        if outcome.ran_into_limit and isinstance(error, Exception):
            return respond(environ, start_response, admission.work, outcome, replacing=True)
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
        """Close the application's iterable, and settle the request."""
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
            self._admission.abort("the response was closed before its end: the client closed the connection")

    def _next(self) -> bytes:
        if self._iterator is None:
            self._iterator = iter(self._result)
        return next(self._iterator)


class _SizedResponse(_Response):
    """A response whose length is known; a server may derive Content-Length from it."""

    def __len__(self) -> int:
        return len(self._result)  # type: ignore[arg-type]


def _detail(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
