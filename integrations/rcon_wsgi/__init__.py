"""Confine each request of a WSGI application: `ConfineMiddleware`, for any WSGI server.

::

    application = ConfineMiddleware(application, "rcon.toml")

An adapter for a server can do more: start the fork server in each worker, pass the client's socket, and end all
executors with the worker. The checklist for an adapter:

1. One `RunningManager` per serving process: `Manager.deploy` in the parent, then `Deployment.start(WsgiService(app))`
   in each process that serves, after the application is loaded and before threads serve; `RunningManager.close`
   when that process ends.
2. ``ConfineMiddleware(app, manager=manager)`` around the application, made in the same process.
3. The traits of the server: `Server(threads=…, greenlets=…)`. They decide which policies may run inline.
4. ``client_socket``, if the server exposes the socket. Then a request whose client has gone is stopped even while it
   writes nothing, and a response can be cut off even if only the end of the connection marks its end. Return None for
   connections that carry several requests at once (HTTP/2), and under gevent.
5. Enter and leave the confinement in one block around a call. No pair of callbacks, no signals, no monkeypatching.
6. Fail closed: do not run a request that cannot be confined; answer it with a 503.
7. Settle every admission exactly once, as finished, died or aborted.
8. Check every frame of an executor process before using it.
9. Refuse at start, with the reason, a worker type that cannot keep these rules.
"""

from __future__ import annotations

from rcon_wsgi.exchange import ResponseCut
from rcon_wsgi.middleware import ConfineMiddleware
from rcon_wsgi.request import work_of
from rcon_wsgi.service import WsgiService

__all__ = ["ConfineMiddleware", "ResponseCut", "WsgiService", "work_of"]
