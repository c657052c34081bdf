"""One WSGI application for all customers. It does not know users or rcon-plugins.

Each customer has a folder with the name of its host, below the directory in the environment variable ``CUSTOMERS``.

- ``GET /whoami``: the user, groups and capabilities that this request runs with.
- ``GET /read?of=FILE``: the size of the file. It has a bug: FILE may lie outside the customer's folder.
- ``GET /write``: write a new file into the customer's folder.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

CUSTOMERS = Path(os.environ.get("CUSTOMERS", "/srv"))


def whoami() -> dict[str, Any]:
    """Return the ids and capabilities of the thread that serves this request."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {
        "uids": sorted({int(uid) for uid in fields["Uid"].split()}),
        "gids": sorted({int(gid) for gid in [*fields["Gid"].split(), *fields["Groups"].split()]}),
        "capabilities": {name: int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")},
    }


def read(file: str) -> dict[str, Any]:
    """Return the size of any file that this request may read."""
    return {"bytes": len((CUSTOMERS / file).read_bytes())}


def write(folder: Path) -> dict[str, Any]:
    """Write a new file into the customer's folder."""
    file = folder / f"written-{uuid.uuid4().hex}"
    file.write_text("written by a request\n")
    return {"file": file.name}


def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """The application: ``anna.example`` is the customer with the folder ``anna.example``, and so on."""
    host = environ.get("HTTP_HOST", "").partition(":")[0]
    path = environ["PATH_INFO"]
    status = "200 OK"
    try:
        if host not in os.listdir(CUSTOMERS):  # noqa: PTH208 - names, no paths
            status, answer = "404 Not Found", {"error": f"no customer {host!r}"}
        elif path == "/whoami":
            answer = whoami()
        elif path == "/read":
            answer = read(parse_qs(environ["QUERY_STRING"])["of"][0])
        elif path == "/write":
            answer = write(CUSTOMERS / host)
        else:
            status, answer = "404 Not Found", {"error": f"nothing at {path}"}
    except OSError as error:
        status, answer = "403 Forbidden", {"error": errno.errorcode.get(error.errno or 0, "?")}
    body = json.dumps(answer).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
