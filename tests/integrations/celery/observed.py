"""An application with handlers on each side, and with the libraries that observe tasks; for a worker.

Handlers and bodies write what they see to the list ``log:<name>`` in Redis. The environment says which libraries are
set up.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import celery
import redis
from celery import signals
from celery.exceptions import Ignore

from rcon_celery import confined, handler_side, install

URL = "OBSERVED_BROKER"
#: The libraries to set up.
LIBRARIES = "OBSERVED_LIBRARIES"
#: How long the handler of ``worker_process_shutdown`` takes in an executor process, seconds.
SLOW_END = "RCON_TEST_SLOW_END"
POLICY = "OBSERVED_POLICY"
#: A JSON object for ``handler_sides``.
SIDES = "OBSERVED_SIDES"


def note(name: str, *what: object) -> None:
    with redis.Redis.from_url(os.environ[URL]) as client:
        client.rpush(f"log:{name}", json.dumps(what))


def is_inside() -> bool:
    """Return whether this process is an executor process."""
    return "/work/" in Path("/proc/self/cgroup").read_text()


@signals.task_prerun.connect
def prerun(task_id: str, sender: Any, task: Any, args: Any, kwargs: Any, **_: object) -> None:
    note(task_id, "prerun", is_inside(), sender is task, list(args), kwargs)


@signals.task_prerun.connect
@handler_side("outside")
def prerun_outside(task_id: str, **_: object) -> None:
    note(task_id, "prerun outside", is_inside())


@signals.task_prerun.connect
@handler_side("both")
def prerun_both(task_id: str, **_: object) -> None:
    note(task_id, "prerun both", is_inside())


@signals.task_prerun.connect
def prerun_fails(**_: object) -> None:
    raise ValueError("a handler that fails")


@signals.task_postrun.connect
def postrun(task_id: str, state: str, retval: Any, **_: object) -> None:
    note(task_id, "postrun", is_inside(), state, repr(retval))


@signals.worker_process_init.connect
def init(**_: object) -> None:
    note("init", is_inside(), os.getpid())


@signals.worker_process_init.connect
@handler_side("outside")
def init_outside(**_: object) -> None:
    note("init outside", is_inside(), os.getpid())
    signals.task_prerun.connect(prerun_late)


def prerun_late(task_id: str, **_: object) -> None:
    note(task_id, "prerun late", is_inside())


@signals.worker_process_shutdown.connect
def shutdown(pid: int, exitcode: int, **_: object) -> None:
    if is_inside():
        time.sleep(float(os.environ.get(SLOW_END, "0")))
    note("shutdown", is_inside(), pid, pid == os.getpid(), exitcode)


def libraries() -> list[str]:
    return os.environ.get(LIBRARIES, "").split()


def set_up(names: Sequence[str]) -> None:
    """Set up libraries as their pages say."""
    if "opentelemetry" in names:
        from opentelemetry import trace
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

        class ToRedis(SpanExporter):
            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                for span in spans:
                    context, parent = span.context, span.parent
                    assert context is not None
                    ids = [f"{context.trace_id:x}", f"{context.span_id:x}", parent and f"{parent.span_id:x}"]
                    note("spans", span.name, *ids, is_inside(), span.status.status_code.name)
                return SpanExportResult.SUCCESS

        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(ToRedis()))
        trace.set_tracer_provider(provider)
        instrumentor: Any = CeleryInstrumentor
        instrumentor().instrument()
    if "sentry" in names:
        import sentry_sdk
        from sentry_sdk.integrations.celery import CeleryIntegration

        def keep(event: Any, _: object) -> None:
            trace_id = event["contexts"]["trace"]["trace_id"]
            what = event["exception"]["values"][-1]["type"] if "exception" in event else event["message"]
            note("events", what, trace_id, event.get("tags", {}), is_inside())

        sentry_sdk.init("http://key@127.0.0.1:9/1", integrations=[CeleryIntegration()], before_send=keep)
    if "ddtrace" in names:
        import ddtrace

        ddtrace.patch(celery=True)
    if "structlog" in names:
        import structlog

        @signals.task_prerun.connect(weak=False)
        @handler_side("outside")
        def bind(task_id: str, **_: object) -> None:
            structlog.contextvars.clear_contextvars()
            structlog.contextvars.bind_contextvars(task_id=task_id, path=Path("/a"))


def make() -> celery.Celery:
    set_up(libraries())
    url = os.environ[URL]
    app = celery.Celery("observed", broker=url, backend=url, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True)
    install(app, os.environ[POLICY], handler_sides=json.loads(os.environ.get(SIDES, "{}")))

    @app.task(name="echo", shared=False)
    def echo(*args: Any, **kwargs: Any) -> Any:
        return [list(args), kwargs]

    @app.task(name="fail", shared=False)
    def fail() -> None:
        raise KeyError("no")

    @app.task(name="auto", shared=False, bind=True, autoretry_for=(ConnectionError,), default_retry_delay=0)
    def auto(self: Any) -> int:
        if not self.request.retries:
            raise ConnectionError("the first time")
        return int(self.request.retries)

    @app.task(name="ignore", shared=False)
    def ignore() -> None:
        raise Ignore

    @app.task(name="die", shared=False)
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @app.task(name="too_large", shared=False)
    @confined(max_result="10K")
    def too_large() -> str:
        return "x" * 20_000

    @app.task(name="inline", shared=False)
    def inline() -> bool:
        return is_inside()

    @app.task(name="where", shared=False)
    def where() -> list[Any]:
        return [os.getpid(), is_inside()]

    @app.task(name="wait", shared=False)
    def wait(seconds: float) -> None:
        time.sleep(seconds)

    @app.task(name="observe", shared=False)
    def observe() -> dict[str, Any]:
        """Return what the libraries know in the body; make a span, and an event of Sentry."""
        found: dict[str, Any] = {}
        names = libraries()
        if "opentelemetry" in names:
            from opentelemetry import trace

            with trace.get_tracer("observed").start_as_current_span("body"):
                echo.delay()
        if "structlog" in names:
            import structlog

            found["structlog"] = structlog.contextvars.get_contextvars()
            structlog.contextvars.bind_contextvars(left="by the last task")
        if "sentry" in names:
            import sentry_sdk

            scope = sentry_sdk.get_isolation_scope()
            found["left"] = dict(scope._tags)
            scope.set_tag("customer", "acme")
            sentry_sdk.capture_message("from the body")
        if "ddtrace" in names:
            from ddtrace.trace import tracer

            context = tracer.current_trace_context()
            found["ddtrace"] = context and f"{context.trace_id:x}"
        return found

    return app


def __getattr__(name: str) -> Any:
    """Make ``app`` from the environment, when a worker imports it."""
    if name != "app":
        raise AttributeError(name)
    app = make()
    globals()["app"] = app
    return app
