"""Take the contexts of tracers and loggers along to the body of a task, which runs in another process.

In plain Celery they reach the body because it runs in the same thread: the current span of OpenTelemetry, ddtrace and
Sentry, and the context variables of structlog. `carried` collects them in the pool's process, as data; `entered` enters
them in the executor process. Only libraries that the application has loaded are looked at.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

Carrier = dict[str, Any]

#: What crosses as it is. Anything else crosses as text.
_PLAIN: Final = (str, int, float, bool, type(None))


def carried() -> dict[str, Carrier]:
    """Return the contexts of this thread, by the name of the library. Empty without any."""
    found = {}
    for name, (module, collect, _) in _LIBRARIES.items():
        if module in sys.modules:
            with contextlib.suppress(Exception):  # a tracer must not end a task
                if carrier := collect():
                    found[name] = carrier
    return found


def entered(contexts: Mapping[str, Carrier]) -> AbstractContextManager[None]:
    """Enter contexts that `carried` returned, in an executor process, for a ``with`` block.

    A library that has none gets an empty one, so that nothing of the last task is left in it.
    """
    # A new process copies each page of memory that it touches: do nothing for a library that has and gets nothing.
    names = [
        name
        for name, (module, _, _) in _LIBRARIES.items()
        if module in sys.modules and (name in contexts or not _is_empty(name))
    ]
    return _entered(contexts, names) if names else contextlib.nullcontext()


@contextlib.contextmanager
def _entered(contexts: Mapping[str, Carrier], names: list[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            _, _, enter = _LIBRARIES[name]
            with contextlib.suppress(Exception):
                stack.enter_context(enter(contexts.get(name, {})))
        yield


def _is_empty(name: str) -> bool:
    """Return whether a library has an empty context here. False if that is not known."""
    if name == "opentelemetry":
        with contextlib.suppress(Exception):
            from opentelemetry.context import get_current

            return not get_current()
    return False


def _from_opentelemetry() -> Carrier:
    from opentelemetry.propagate import inject

    carrier: Carrier = {}
    inject(carrier)
    return carrier


@contextlib.contextmanager
def _to_opentelemetry(carrier: Carrier) -> Iterator[None]:
    from opentelemetry import context
    from opentelemetry.propagate import extract

    token = context.attach(extract(carrier, context.Context()))
    try:
        yield
    finally:
        context.detach(token)


def _from_ddtrace() -> Carrier:
    from ddtrace.propagation.http import HTTPPropagator
    from ddtrace.trace import tracer

    carrier: Carrier = {}
    context = tracer.current_trace_context()
    if context is not None:
        HTTPPropagator.inject(context, carrier)
    return carrier


@contextlib.contextmanager
def _to_ddtrace(carrier: Carrier) -> Iterator[None]:
    from ddtrace.propagation.http import HTTPPropagator
    from ddtrace.trace import tracer

    propagator: Any = HTTPPropagator  # its functions have no types
    tracer.context_provider.activate(propagator.extract(carrier) if carrier else None)
    try:
        yield
    finally:
        tracer.context_provider.activate(None)


def _from_sentry() -> Carrier:
    import sentry_sdk

    if not sentry_sdk.is_initialized():
        return {}
    carrier = {"sentry-trace": sentry_sdk.get_traceparent(), "baggage": sentry_sdk.get_baggage()}
    return {name: value for name, value in carrier.items() if value}


@contextlib.contextmanager
def _to_sentry(carrier: Carrier) -> Iterator[None]:
    import sentry_sdk

    with sentry_sdk.isolation_scope():
        if carrier:
            sentry_sdk.continue_trace(carrier)
        yield


def _from_structlog() -> Carrier:
    from structlog.contextvars import get_contextvars

    return {
        str(name): value if isinstance(value, _PLAIN) else str(value)
        for name, value in get_contextvars().items()
    }


@contextlib.contextmanager
def _to_structlog(carrier: Carrier) -> Iterator[None]:
    from structlog.contextvars import bind_contextvars, clear_contextvars

    clear_contextvars()
    bind_contextvars(**carrier)
    try:
        yield
    finally:
        clear_contextvars()


#: For each library: the module that an application which uses it has loaded; the functions for the two sides.
_LIBRARIES: Final[
    Mapping[str, tuple[str, Callable[[], Carrier], Callable[[Carrier], AbstractContextManager[None]]]]
] = {
    "opentelemetry": ("opentelemetry.trace", _from_opentelemetry, _to_opentelemetry),
    "ddtrace": ("ddtrace.trace", _from_ddtrace, _to_ddtrace),
    "sentry": ("sentry_sdk", _from_sentry, _to_sentry),
    "structlog": ("structlog.contextvars", _from_structlog, _to_structlog),
}
