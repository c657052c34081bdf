"""An application under Datadog's tracer, as ``import ddtrace.auto`` sets it up."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - the user of the requests may be unable to read the interpreter's files
import os

import ddtrace.auto  # noqa: F401 - first of all, as Datadog's guide says
from flask import Flask

app = Flask(__name__)


@app.get("/free/who")
def who() -> str:
    return f"{os.getpid()} {os.getuid()}"
