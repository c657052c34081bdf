"""An application whose tasks log and print in all ways; for a worker."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import celery
import redis
from celery import signals
from celery.utils.log import get_task_logger

from rcon_celery import install

URL = "LOGGED_BROKER"
#: The policy file. Without it the tasks are not confined.
POLICY = "LOGGED_POLICY"
#: How logging is set up: json, structlog, own, dictconfig. Celery's own way without it.
SETUP = "LOGGED_SETUP"

task_logger = get_task_logger(__name__)
own_logger = logging.getLogger("proj.orders")


class JsonFormatter(logging.Formatter):
    """A formatter as many applications have one: all that a record has, as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        found = {name: value for name, value in vars(record).items() if name != "exc_info"}
        found["text"] = super().format(record)
        return json.dumps(found, default=str)


class ToRedis(logging.Handler):
    """A handler with a connection of its own, as those of tracers have."""

    def emit(self, record: logging.LogRecord) -> None:
        with redis.Redis.from_url(os.environ[URL]) as client:
            client.rpush("log:handled", json.dumps([os.getpid(), record.levelname, record.getMessage()]))


def set_up(how: str) -> None:
    if how == "json":

        @signals.after_setup_logger.connect(weak=False)
        @signals.after_setup_task_logger.connect(weak=False)
        def use_json(logger: logging.Logger, **_: object) -> None:
            for handler in logger.handlers:
                handler.setFormatter(JsonFormatter())

    if how == "structlog":
        import structlog

        structlog.configure(
            processors=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
        )

        @signals.setup_logging.connect(weak=False)
        def use_structlog(**_: object) -> None:
            formatter = structlog.stdlib.ProcessorFormatter(
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.JSONRenderer(),
                ]
            )
            handler = logging.StreamHandler(sys.__stderr__)
            handler.setFormatter(formatter)
            logging.getLogger().addHandler(handler)
            logging.getLogger().setLevel("INFO")

    if how == "own":  # with worker_hijack_root_logger off
        logging.basicConfig(format="OWN %(levelname)s %(name)s %(message)s", level="INFO")
    if how == "handlers":
        logging.getLogger("proj").addHandler(ToRedis())
    if how == "opentelemetry":
        from opentelemetry import trace
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
        from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
        from opentelemetry.sdk._logs.export import (
            LogRecordExporter,
            LogRecordExportResult,
            SimpleLogRecordProcessor,
        )
        from opentelemetry.sdk.trace import TracerProvider

        class Exporter(LogRecordExporter):
            def export(self, batch: Sequence[Any]) -> Any:
                with redis.Redis.from_url(os.environ[URL]) as client:
                    for one in batch:
                        record = one.log_record
                        found = [os.getpid(), str(record.body), f"{record.trace_id:x}"]
                        client.rpush("log:handled", json.dumps(found))
                return LogRecordExportResult.SUCCESS

            def shutdown(self) -> None: ...

            def force_flush(self, timeout_millis: int = 0) -> bool:
                return True

        trace.set_tracer_provider(TracerProvider())
        instrumentor: Any = CeleryInstrumentor
        instrumentor().instrument()
        provider = LoggerProvider()
        provider.add_log_record_processor(SimpleLogRecordProcessor(Exporter()))
        logging.getLogger("proj").addHandler(LoggingHandler(logger_provider=provider))
    if how == "sentry":
        import sentry_sdk

        def keep(event: Any, _: object) -> None:
            with redis.Redis.from_url(os.environ[URL]) as client:
                found = [os.getpid(), event.get("logentry", {}).get("message")]
                client.rpush("log:handled", json.dumps(found))

        sentry_sdk.init("http://key@127.0.0.1:9/1", before_send=keep)


def make() -> celery.Celery:
    how = os.environ.get(SETUP, "")
    set_up(how)
    url = os.environ[URL]
    app = celery.Celery("logged", broker=url, backend=url, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=how != "own")
    if POLICY in os.environ:
        install(app, os.environ[POLICY])

    @app.task(name="say", shared=False)
    def say(word: str) -> int:
        """Log and print in all ways."""
        task_logger.warning("task logger %s", word)
        own_logger.info("own logger %s", word, extra={"order": {"number": 7}, "customer": word})
        get_task_logger("made.in.the.body").error("late logger %s", word)
        print(f"printed {word}")
        print(f"error {word}", file=sys.stderr)
        os.write(1, f"written {word}\n".encode())
        subprocess.run(["/bin/sh", "-c", f"echo program {word} >&2"], check=True)
        thread = threading.Thread(target=lambda: own_logger.info("thread %s", word), name="helper")
        thread.start()
        thread.join()
        try:
            raise ValueError(f"caught {word}")
        except ValueError:
            own_logger.exception("exception %s", word)
        own_logger.debug("nobody wants this %s", word)
        return os.getpid()

    @app.task(name="event", shared=False)
    def event(word: str) -> None:
        import structlog

        structlog.get_logger("proj.events").info("an event", word=word, number=7)

    @app.task(name="forge", shared=False)
    def forge(word: str) -> None:
        """Do what a tenant might do to forge lines."""
        own_logger.warning(
            "first %s\n[2026-01-01 00:00:00,000: INFO/MainProcess] Task other[1] succeeded \x1b[31m", word
        )
        logging.getLogger("celery.app.trace").warning("Task other[2] succeeded %s", word)
        own_logger.warning("extra %s", word, extra={"task_id": "of another", "field": "a\nb"})
        sent = {"name": "celery.worker", "via": "celery.worker", "level": 20, "created": 0.0, "work": "ffff"}
        for line in (
            json.dumps({**sent, "message": f"raw {word}\nTask other[3] succeeded"}),
            json.dumps(
                {**sent, "message": f"deep {word}", "extra": {"a": json.loads("[" * 500 + "]" * 500)}}
            ),
            json.dumps({**sent, "message": f"unknown {word}", "args": [1]}),
            json.dumps(
                {**sent, "message": f"own {word}", "extra": {"levelname": "X", "process": 1, "b c": 2}}
            ),
            "{" * 20_000,
            f'"not a record {word}"',
        ):
            os.write(2, b"\x1e" + line.encode() + b"\n")

    @app.task(name="flood", shared=False)
    def flood(lines: int, size: int) -> None:
        for number in range(lines):
            own_logger.warning("flood %d %s", number, "x" * size)
        own_logger.warning("flood is over")

    return app


def __getattr__(name: str) -> Any:
    """Make ``app`` from the environment, when a worker imports it."""
    if name != "app":
        raise AttributeError(name)
    app = make()
    globals()["app"] = app
    return app
