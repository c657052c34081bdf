"""gunicorn's worker classes: whether they can be confined, and the traits that decide how."""

from __future__ import annotations

from collections.abc import Callable

from rcon_plugins.confinement.isolation import Server

_GEVENT = Server(threads=False, greenlets=True)

#: Worker classes that call a WSGI application, and what their requests share. Subclasses are included.
KNOWN: dict[str, Server] = {
    "gunicorn.workers.sync.SyncWorker": Server(threads=False),
    "gunicorn.workers.gthread.ThreadWorker": Server(threads=True),
    "gunicorn.workers.ggevent.GeventWorker": _GEVENT,
}

_REASONS = {
    "gunicorn.workers.gtornado.TornadoWorker": "it serves coroutines on one event loop",
    "gunicorn.workers.gasgi.ASGIWorker": "it serves ASGI, where requests are coroutines on one event loop",
}


def server_traits(worker_class: type) -> Server | None:
    """Return what the requests of such a worker share; None if they cannot be confined."""
    for base in worker_class.__mro__:
        known = KNOWN.get(_name(base))
        if known is not None:
            return known
    return None


def after_fork(traits: Server) -> list[Callable[[], object]]:
    """Return what to call in each executor process forked from a worker with these traits."""
    if not traits.greenlets:
        return []
    import gevent  # type: ignore[import-untyped]

    return [gevent.reinit]  # its event loop and threads would be the worker's


def refusal(worker_class: type) -> str:
    """Return why the requests of this class cannot be confined, and what to use instead."""
    reasons = (_REASONS[name] for name in map(_name, worker_class.__mro__) if name in _REASONS)
    reason = next(reasons, "rcon_gunicorn does not know how it calls the application")
    return (
        f"the worker class {_name(worker_class)} cannot be confined: {reason}; "
        "use sync, gthread or gevent (gunicorn -k gthread)"
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
