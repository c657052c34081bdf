"""Where the output of tasks goes that run as a user of their own."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from tests.integrations.celery.producers import closing
from tests.integrations.celery.sessions import SETTINGS, Session, Sessions
from tests.integrations.celery.worker import READY
from tests.processes import until

POLICY = SETTINGS + '[policy.user]\nuser = "nobody"\nper = "task"\n[[route]]\ntask = "say"\npolicy = "user"\n'


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
@pytest.mark.parametrize("file", [False, True])
def test_output_of_tasks_is_logged_with_the_policy_and_the_key(
    sessions: Sessions, tmp_path: Path, pool: str, file: bool
) -> None:
    path = tmp_path / "worker.log"
    arguments = ["--logfile", str(path)] if file else []
    worker, app, url = sessions.make(*arguments, settings=POLICY, pool=pool, concurrency=1)

    def log() -> str:
        if not file:
            return worker.log()
        return path.read_text() if path.exists() else ""

    try:
        with closing(app), contextlib.closing(Session(worker, app, url)) as session:
            until(lambda: READY in log(), 60)
            sent = session.send("say", 7)
            assert session.wait(sent) == ["pipe", "pipe"]
            wanted = ("printed 7", "logged 7", "written 7", "from a program 7")

            def said() -> list[str]:
                return [line for line in log().splitlines() if line.endswith(wanted)]

            until(lambda: len(said()) >= len(wanted), 20)
            head = r"\[[^\]]+: WARNING/[\w-]+\] "
            of_task = rf"say\[{sent.id}\]: "
            for line in said():
                task = of_task if line.endswith("logged 7") else ""
                assert re.match(rf"{head}{task}\[user say\] ", line), line
            assert len(said()) == len(wanted)
    finally:
        worker.stop()
