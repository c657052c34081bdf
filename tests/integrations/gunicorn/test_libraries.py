"""Libraries that start threads again after a fork: OpenTelemetry, Datadog, Sentry. Each as its own guide sets it up."""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.integrations.gunicorn.server import Gunicorn
from tests.integrations.gunicorn.tenants import TENANTS
from tests.processes import until

LIBRARIES = Path(__file__).resolve().parent / "libraries"
UID = TENANTS["tenant1"]
SETTINGS = f"""
[policy.free]
user = {UID}
group = {UID}
memory = "256M"
pids = 64
each = {{ timeout = "20s" }}

[[route]]
policy = "free"
"""


class Collector:
    """What the libraries send to, on loopback: the path and the content of each request."""

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                coding = self.headers.get("Content-Encoding")
                if coding == "gzip":
                    content = gzip.decompress(content)
                elif coding == "deflate":
                    content = zlib.decompress(content)
                received.append((self.path, content))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_PUT = do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def has(self, path: str, text: str) -> bool:
        """Return whether something that contains the text was sent to a path that contains the other."""
        return any(path in to and text.encode() in content for to, content in list(self.received))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def server(directory: Path, module: str, collector: Collector, **environ: str) -> Gunicorn:
    return Gunicorn(
        directory,
        SETTINGS,
        "--pythonpath",
        str(LIBRARIES),
        app=f"{module}:app",
        environ={"TEST_COLLECTOR": collector.address, "HOME": "/", **environ},
    )


def served(gunicorn: Gunicorn) -> int:
    """Ask three times. Return the pid of the executor process, which is the same one each time."""
    answers = {gunicorn.get("/free/who").body.decode() for _ in range(3)}
    assert len(answers) == 1, answers
    pid, uid = answers.pop().split()
    assert int(uid) == UID
    assert int(pid) in gunicorn.executors()
    return int(pid)


def test_opentelemetry_exports_traces_and_metrics_from_the_executor(
    tmp_path: Path, collector: Collector
) -> None:
    with server(tmp_path, "opentelemetry_app", collector) as gunicorn:
        pid = served(gunicorn)
        until(lambda: collector.has("/v1/traces", f"request in {pid}"))
        until(lambda: collector.has("/v1/metrics", "requests"))
    assert "Traceback" not in gunicorn.log()


def test_datadog_sends_traces_from_the_executor(tmp_path: Path, collector: Collector) -> None:
    quiet = {
        "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
        "DD_REMOTE_CONFIGURATION_ENABLED": "false",
        "DD_SERVICE": "confined",
    }
    with server(
        tmp_path, "ddtrace_app", collector, DD_TRACE_AGENT_URL=collector.address, **quiet
    ) as gunicorn:
        served(gunicorn)
        until(lambda: collector.has("/traces", "/free/who"))


def test_sentry_sends_errors_from_the_executor(tmp_path: Path, collector: Collector) -> None:
    with server(tmp_path, "sentry_app", collector) as gunicorn:
        pid = served(gunicorn)
        assert gunicorn.status("/free/fails") == 500
        until(lambda: collector.has("/api/1/envelope", f"failed in {pid}"))
