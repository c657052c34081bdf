"""An application that tells Sentry of its errors."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - the user of the requests may be unable to read the interpreter's files
import os

import sentry_sdk
from flask import Flask

sentry_sdk.init(os.environ["TEST_COLLECTOR"].replace("://", "://key@") + "/1", traces_sample_rate=1.0)
app = Flask(__name__)


@app.get("/free/who")
def who() -> str:
    return f"{os.getpid()} {os.getuid()}"


@app.get("/free/fails")
def fails() -> str:
    raise LookupError(f"failed in {os.getpid()}")
