"""What not to do: make the middleware, fork, and serve in the child."""

from __future__ import annotations

import logging
import os
import signal
import sys

from rcon_wsgi import ConfineMiddleware
from tests.integrations.wsgi.serve import Handler, Server, by_path

if __name__ == "__main__":
    logging.basicConfig(format="%(name)s: %(message)s")
    middleware = ConfineMiddleware(by_path, sys.argv[1])
    child = os.fork()
    if child == 0:
        server = Server(("127.0.0.1", 0), Handler)
        server.set_app(middleware)
        print(server.server_port, flush=True)
        server.serve_forever()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    os.waitpid(child, 0)
    middleware.close()
