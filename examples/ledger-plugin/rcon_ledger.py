"""A third-party plugin for rcon-plugins: what each tenant used, one line of JSON for each request or task.

Install it beside rcon-plugins and name it in the settings: ``plugins = ["ledger"]``. The lines go to the file that the
environment variable ``RCON_LEDGER`` names, by default ``rcon-ledger.jsonl`` in the working directory. One ``write`` a
line, appended, so that the workers of a server can share the file.

With ``RCON_PLUGINS=ledger`` in the environment there is a command besides: ``rcon ledger`` sums the lines up.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rcon_plugins import Outcome, Work, hookimpl

if TYPE_CHECKING:
    import click

FILE = "rcon-ledger.jsonl"


@hookimpl
def rcon_work_finished(work: Work, outcome: Outcome) -> None:
    """Append one line: policy, key, name, ending and usage."""
    line = {
        "policy": outcome.policy,
        "key": outcome.key,
        "work": work.name,
        "ending": outcome.ending,
        **msgspec.to_builtins(outcome.usage),
    }
    file = os.open(os.environ.get("RCON_LEDGER", FILE), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)


@hookimpl
def rcon_commands(cli: click.Group) -> None:
    """Add ``rcon ledger``. click is imported here, because a server does not need it."""
    import click

    @cli.command(short_help="Sum up what each tenant used.")
    @click.argument("file", type=click.Path(), envvar="RCON_LEDGER", default=FILE)
    def ledger(file: str) -> None:
        """Sum up the ledger FILE: CPU seconds, and the number of requests and tasks, by policy and key.

        \b
          RCON_PLUGINS=ledger rcon ledger /var/log/rcon-ledger.jsonl
        """
        try:
            lines = Path(file).read_text().splitlines()
        except OSError as error:
            raise click.UsageError(f"{file}: {error.strerror} (name the file, or set RCON_LEDGER)") from None
        counts, seconds = Counter[str](), Counter[str]()
        for line in map(json.loads, lines):
            name = "~".join(filter(None, (line["policy"], line["key"])))
            counts[name] += 1
            seconds[name] += line["cpu_seconds"] or 0
        for name in sorted(counts, key=lambda name: -seconds[name]):
            click.echo(f"{seconds[name]:10.2f} s {counts[name]:8}  {name}")
