"""A third-party plugin for rcon-plugins: what each tenant used, one line of JSON for each work.

Install it beside rcon-plugins and name it in the settings: ``plugins = ["ledger"]``. The lines go to the file that the
environment variable ``RCON_LEDGER`` names, by default ``rcon-ledger.jsonl`` in the working directory. One ``write`` a
line, appended, so that the workers of a server can share the file.
"""

from __future__ import annotations

import json
import os

import msgspec

from rcon_plugins import Outcome, Work, hookimpl


@hookimpl
def rcon_work_finished(work: Work, outcome: Outcome) -> None:
    """Append one line: who, what, how it ended, and what it used."""
    line = {
        "policy": outcome.policy,
        "key": outcome.key,
        "work": work.name,
        "ending": outcome.ending,
        **msgspec.to_builtins(outcome.usage),
    }
    file = os.open(
        os.environ.get("RCON_LEDGER", "rcon-ledger.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640
    )
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)
