"""The middleware: asks the manager for each request, and runs the application the way it says."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.confinement.isolation import Server
from rcon_plugins.confinement.manager import Manager
from rcon_plugins.errors import IdentityRefused, LimitExceeded, RconError
from rcon_plugins.outcome import Outcome
from rcon_plugins.settings.file import Settings, load
from rcon_wsgi import inprocess, problem
from rcon_wsgi.exchange import Exchange
from rcon_wsgi.request import work_of
from rcon_wsgi.service import WsgiService

if TYPE_CHECKING:
    import socket

    from _typeshed.wsgi import StartResponse, WSGIApplication

_log = logging.getLogger("rcon.wsgi")


class ConfineMiddleware:
    """A WSGI application that confines another: each request gets the policy that the settings name for it.

    Construct it after the application is loaded, in the process that serves, before it starts threads: without
    a ``manager`` it makes its own and forks the fork server here and now. A server that loads the application
    and *then* forks its workers would share one fork server among them: the middleware notices, and answers
    503. Use the server's adapter there, or do without preloading.

    :param app: the application.
    :param settings: `Settings`, or the path of a policy file.
    :param manager: a manager started in this process with ``WsgiService(app)``. Who made it closes it.
    :param server: what of the server decides how work can be confined, for the middleware's own manager. The
        default is the cautious one: other threads serve, too.
    :param client_socket: names the client's socket for an environ, or None. With it a request whose client has
        closed the connection (or its half of it, as with nginx) is stopped also while it writes nothing, and
        a response that must be cut resets the connection: the socket is closed. At the deadline it is shut
        down where the server waits for the client. Not for connections that
        carry several requests at once, and not where ``select.poll`` is gevent's.
    :raises SettingsError: the settings are wrong, or this machine cannot enforce them.
    :raises KernelError: no part of the cgroup tree can be used.
    """

    def __init__(
        self,
        app: WSGIApplication,
        settings: Settings | str | os.PathLike[str] | None = None,
        *,
        manager: Manager | None = None,
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
                "refused: this process (%d) was forked after the middleware was made (in %d); "
                "make it in the process that serves, or use the server's adapter",
                os.getpid(),
                self._owner,
            )
            return problem.respond(environ, start_response, Outcome(ending="refused"))
        client = self._client_socket(environ) if self._client_socket is not None else None
        try:
            admission = self._manager.admit(work_of(environ))
        except LimitExceeded as error:
            return problem.respond(environ, start_response, *problem.of(error))
        except IdentityRefused:
            return problem.respond(environ, start_response, Outcome(ending="forbidden"))
        except RconError:  # told to hooks and log by the manager
            return problem.respond(environ, start_response, Outcome(ending="refused"))
        if admission is None:
            return self._app(environ, start_response)
        if isinstance(admission, ProcessAdmission):
            return Exchange(environ, admission, client).begin(start_response)
        return inprocess.run(self._app, environ, start_response, admission)

    def close(self) -> None:
        """End the manager, if the middleware made it; also done when the process exits. Nothing is served then."""
        if self._owns_manager and os.getpid() == self._owner:
            self._manager.close()


def _own_manager(
    app: WSGIApplication, settings: Settings | str | os.PathLike[str] | None, server: Server | None
) -> Manager:
    if settings is None:
        raise TypeError("ConfineMiddleware needs settings, or a manager")
    if not isinstance(settings, Settings):
        settings = load(os.fspath(settings))
    manager = Manager(settings, server=server or Server())
    manager.start(WsgiService(app))
    return manager
