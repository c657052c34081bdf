"""Serve the applications of `apps`, or those of `long_apps`, on a free port of 127.0.0.1, and print that port.

``python -m tests.contract.wsgi.serve SERVER MODE``: SERVER is wsgiref or gunicorn. MODE is direct, inline, thread or
process. With the suffix ``-validated``, wsgiref.validate checks both sides of the middleware. With ``-long``, it serves
`long_apps`. The outcome of each request is logged.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.validate import validator

import gunicorn.app.base  # type: ignore[import-untyped]

from rcon_plugins.outcome import Outcome
from rcon_wsgi import ConfineMiddleware, WsgiService
from tests.contract.wsgi import apps, double, long_apps


def application(mode: str) -> Any:
    """Return the application for the mode. It forks its executor, so call it in the process that serves."""
    mode, _, variant = mode.partition("-")
    app: Any = long_apps.by_path if variant == "long" else apps.by_path
    validated = variant == "validated"
    app = validator(app) if validated else app
    if mode != "direct":
        manager: Any = double.Manager(mode)
        manager.verdict = say_outcome
        manager.start(WsgiService(app))
        client_socket = None if validated else lambda environ: environ.get("gunicorn.socket")
        app = ConfineMiddleware(app, manager=manager, client_socket=client_socket)
        app = validator(app) if validated else app
    return app


def say_outcome(outcome: Outcome) -> Outcome:
    print(f"<outcome {outcome.ending}: {outcome.detail}>", file=sys.stderr, flush=True)
    return outcome


class Handler(WSGIRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def serve_wsgiref(mode: str) -> None:
    app = application(mode)
    server = WSGIServer(("127.0.0.1", 0), Handler)
    server.set_app(app)
    print(server.server_port, flush=True)
    server.serve_forever()


class Gunicorn(gunicorn.app.base.BaseApplication):  # type: ignore[misc]
    def __init__(self, mode: str) -> None:
        self._mode = mode
        super().__init__()

    def load_config(self) -> None:
        for name, value in {
            "bind": "127.0.0.1:0",
            "worker_class": "gthread",
            "threads": 2,
            "accesslog": None,
            "control_socket_disable": True,
            "when_ready": lambda arbiter: print(arbiter.LISTENERS[0].getsockname()[1], flush=True),
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return application(self._mode)


if __name__ == "__main__":
    os.environb[b"RCON_TEST_SURROGATE"] = b"\xff and \xe9"
    server, mode = sys.argv[1:]
    if server == "wsgiref":
        serve_wsgiref(mode)
    else:
        Gunicorn(mode).run()
