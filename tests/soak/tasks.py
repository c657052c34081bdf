"""The Celery application of the soak: each task is an act under a policy, and each result says how it was confined."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from celery import Celery

from rcon_celery import install
from tests.soak.application import act, report
from tests.soak.task_load import FILLER, POLICIES, text_of

BROKER, SETTINGS = "RCON_SOAK_BROKER", "RCON_SOAK_SETTINGS"


def make(broker: str, settings: str) -> Celery:
    """Return the application."""
    made = Celery("soak", broker=broker, backend=broker)
    made.conf.update(
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=1,
        # A pool process of Celery alone grows by some 100 MiB while tasks fail, and then no more.
        worker_max_tasks_per_child=200,
    )
    install(made, settings)
    for policy, (acts, _) in POLICIES.items():
        for name in dict.fromkeys(acts):
            is_kept = name == "kept"
            made.task(name=f"{policy}.{name}", acks_late=is_kept, reject_on_worker_lost=is_kept)(_code(name))
    return made


def _code(name: str) -> Callable[[str, str], list[str]]:
    def run(nonce: str, text: str) -> list[str]:
        if name == "fail":
            raise ValueError(nonce)
        if name == "kept":
            time.sleep(1.2)  # longer than a run without a lease
        act(name)
        return [report(nonce).decode(), nonce * FILLER if name == "large" else text_of(text)]

    return run


app = make(os.environ[BROKER], os.environ[SETTINGS]) if BROKER in os.environ else None
