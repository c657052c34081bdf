"""Confine each request of a WSGI application: `ConfineMiddleware`, for any WSGI server.

::

    application = ConfineMiddleware(application, "rcon.toml")

A server's adapter does better where it knows its server: it can start the fork server in each worker, name
the client's socket, and end everything with the worker. What an adapter (of this or another server) owes:

1. One `Manager` per serving process. `Manager.start(WsgiService(app))` after the application is loaded, in
   the process that serves, before it has threads that serve; `Manager.close` when that process ends.
2. ``ConfineMiddleware(app, settings, manager=manager)`` around the application, made in the same process.
3. The truth about the server: `Server(threads=…, greenlets=…)`. It decides what may run inline.
4. ``client_socket``, where the server shows the socket: so that a request whose client has gone is stopped
   even while it writes nothing, and so that a response that must be cut is cut also where only the end of the
   connection marks its end. None for connections that carry several requests at once (HTTP/2), and under
   gevent.
5. Confinement is entered and left lexically, around a call. No pair of callbacks, no signals, no
   monkeypatching.
6. Fail closed: what cannot be confined does not run; it is answered with a 503.
7. Every admission is settled once, whatever happens: finished, died or aborted.
8. Nothing that an executor process says is believed before it is checked.
9. A server's worker that cannot keep these is refused at start, with the reason.
"""

from __future__ import annotations

from rcon_wsgi.exchange import ResponseCut
from rcon_wsgi.middleware import ConfineMiddleware
from rcon_wsgi.request import work_of
from rcon_wsgi.service import WsgiService

__all__ = ["ConfineMiddleware", "ResponseCut", "WsgiService", "work_of"]
