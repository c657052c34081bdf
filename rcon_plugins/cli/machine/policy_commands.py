"""``rcon check``, ``rcon which`` and ``rcon schema``: what a policy file comes to on this machine."""

from __future__ import annotations

import click

#: check: something is wrong with the settings, or cannot be enforced here. which: the work would be refused.
NOT_AS_ASKED = 1


@click.command(short_help="Say how each policy of FILE would be enforced here, and why.")
@click.argument("file", type=click.Path())
@click.option(
    "--server",
    type=click.Choice(["sync", "gthread", "gevent", "celery"]),
    default="gthread",
    show_default=True,
    help="The kind of server: one work at a time, threads, or greenlets; or a worker of Celery.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def check(file: str, server: str, as_json: bool) -> int:
    """Validate the policy file FILE and say how each policy would be enforced here, and why.

    Refuses what this machine, or this user on it, cannot enforce: with the limit, the reason and the remedy. A line
    with "note:" says where a policy bounds accidents, and is no boundary. Where all is well, root's check makes
    the cgroup to work under, if that is not there.

    \b
      rcon check /etc/rcon.toml
      sudo -u www-data rcon check --server sync /etc/rcon.toml
    """
    from rcon_plugins.cli.machine import check

    text, good = check.check(file, server, as_json)
    click.echo(text)
    return 0 if good else NOT_AS_ASKED


@click.command(short_help="Say which policy of FILE a work gets, and as whom it runs.")
@click.argument("file", type=click.Path())
@click.option("--host", help="The host of a request.")
@click.option("--path", help="The path of a request.")
@click.option("--method", help="The method of a request.")
@click.option("--task", help="The name of a task.")
@click.option("--queue", help="The queue of a task.")
@click.option("--command", "command", help="A command.")
@click.option(
    "--attribute", multiple=True, metavar="NAME=VALUE", help="Any other: remote_addr, header:NAME ..."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def which(file: str, as_json: bool, attribute: tuple[str, ...], **named: str | None) -> int:
    """Say which route of FILE a work takes, under which policy and key it would run, and as whom.

    Exits with 1 if it would be refused. Says nothing of what this machine can enforce: that is `rcon check`.

    \b
      rcon which /etc/rcon.toml --host shop.example --path /img/logo.png
      rcon which /etc/rcon.toml --task reports.monthly
    """
    from rcon_plugins.cli.machine import check

    text, good = check.which(file, check.attributes_of(named, attribute), as_json)
    click.echo(text)
    return 0 if good else NOT_AS_ASKED


@click.command(short_help="Print the JSON schema of a policy file.")
def schema() -> int:
    """Print the JSON schema of a policy file, for editors and pipelines."""
    import json

    from rcon_plugins.settings.file import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
    return 0
