"""A threaded wsgiref server with a confined application, on a free port of 127.0.0.1, which is printed.

``python -m tests.integrations.wsgi.serve SETTINGS``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from rcon_wsgi import ConfineMiddleware
from tests.contract.wsgi import apps
from tests.integrations.gunicorn.fields import FieldsFormatter

Environ = dict[str, Any]
TEXT = [("Content-Type", "text/plain; charset=utf-8")]


def who(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return [str(os.getpid()).encode()]


def allocate(environ: Environ, start_response: Any) -> Iterable[bytes]:
    kept = [b"x" * (1 << 20) for _ in range(200)]
    start_response("200 OK", [*TEXT])
    return [str(len(kept)).encode()]


def allocate_in_the_stream(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b"begun"
    kept = [b"x" * (1 << 20) for _ in range(200)]
    yield str(len(kept)).encode()


def sleep(environ: Environ, start_response: Any) -> Iterable[bytes]:
    time.sleep(float(environ["QUERY_STRING"]))
    start_response("200 OK", [*TEXT])
    return [b"awake"]


def fork(environ: Environ, start_response: Any) -> Iterable[bytes]:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
    start_response("200 OK", [*TEXT])
    return [b"forked"]


def fork_and_make_a_page_of_it(environ: Environ, start_response: Any) -> Iterable[bytes]:
    """As frameworks do."""
    try:
        return fork(environ, start_response)
    except OSError:
        start_response("500 Internal Server Error", [*TEXT])
        return iter([b"something went wrong"])


def leave_something_running(environ: Environ, start_response: Any) -> Iterable[bytes]:
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(30)
        os._exit(0)
    start_response("200 OK", [*TEXT])
    return [str(child).encode()]


APPS: dict[str, Callable[[Environ, Any], Iterable[bytes]]] = {
    app.__name__.replace("_", "-"): app
    for app in (who, allocate, allocate_in_the_stream, sleep, fork, fork_and_make_a_page_of_it)
}
APPS["leave-something-running"] = leave_something_running


def by_path(environ: Environ, start_response: Any) -> Iterable[bytes]:
    app = APPS.get(environ["PATH_INFO"][1:], apps.by_path)
    return app(environ, start_response)


class Handler(WSGIRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def main(settings: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(FieldsFormatter("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    middleware = ConfineMiddleware(by_path, settings)
    server = Server(("127.0.0.1", 0), Handler)
    server.set_app(middleware)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
