"""The words that this project has given up: no identifier, module, policy key, help text or JSON name has them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from rcon_plugins.cli.capcon.commands import capcon
from rcon_plugins.cli.rcon import rcon
from rcon_plugins.settings.file import json_schema
from rcon_plugins.tree.instance import Instance
from tests.identifiers import identifiers
from tests.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
CODE = ("rcon_plugins", "integrations", "examples", "tests")

#: Gone as an identifier anywhere: the old word, and what is written instead.
GONE = {
    "max_works": "max_uses",
    "AnswerLimitExceeded": "ResultTooLarge",
    "Attendance": "GroupMonitor",
    "Attended": "MonitoredGroup",
    "attendance": "monitor",
    "attend": "watch",
    "attention": "events",
    "attendant": "events",
    "Wish": "AttachRequest",
    "wish": "request",
    "CannotTake": "AttachRefused",
    "origins": "previous_cgroups",
    "put_back": "restore",
    "Turn": "Reservation",
    "Turns": "Reservations",
    "Purse": "MemoryBudget",
    "purse": "budget",
    "Share": "Allocation",
    "Changes": "PolicyChangeLog",
    "InForce": "LivePolicies",
    "in_force": "read_limits",
    "_succeed": "_spawn_replacement",
    "_ahead": "_spares_wanted",
    "_looks": "_overdue_check_scheduled",
    "_mourners": "_exit_callbacks",
    "_bury": "_reap",
    "_bell": "_sigchld_read",
    "_rope": "_sigchld_write",
    "bell": "sigchld_read",
    "rope": "sigchld_write",
    "_deaf": "_control_broken",
    "fate": "kill_reason",
    "away": "awaiting_ready",
    "spared": "keeps_children",
    "stale": "outdated",
    "complained": "hang_logged",
    "Birth": "SpawnOrder",
    "birth": "order",
    "Death": "ExitReport",
    "death": "report",
    "Notice": "SignalOrder",
    "Kill": "KillOrder",
    "Delivery": "Lease",
    "Pulse": "Heartbeat",
    "Heir": "WaitingDuplicate",
    "heir": "duplicate",
    "Lesson": "Attempt",
    "lesson": "attempt",
    "Ground": "ProcessState",
    "takeover": "annotations",
    "handover": "remote_call",
    "Mark": "MemoryThreshold",
    "Pace": "FrameRateLimiter",
    "from_options": "run",
    "hand_over": "exec",
    "doctoring": "doctor",
    "explaining": "explain",
    "showing": "show",
    "own_place": "own_location",
    "place_of": "location_of",
    "_hear": "_handle_event",
    "listens": "plugins_listen",
    "_listens": "_plugins_listen",
    "_who_can_be_asked": "_usable_bus",
    "SOMEBODY": "OTHER_UID",
    "Office": "Session",
    "Offices": "Sessions",
    "Shop": "ApplicationWorkers",
    "Worlds": "Histories",
    "let_others_in": "let_others_read",
    "asks": "limits_set",
    "wants_tries": "retry_keys",
    "wants_identity": "identity_keys",
}


class Scoped(NamedTuple):
    """A common word that is gone only where it was a name of ours: in the modules that begin with one of ``within``."""

    old: str
    new: str
    within: tuple[str, ...]


#: Routes are put into places of an index; elsewhere "place" had six meanings.
_NOT_SETTINGS = (
    *(f"rcon_plugins.{room}" for room in ("builtin", "cli", "command", "confinement", "executors", "groups")),
    *(f"rcon_plugins.{room}" for room in ("hookspecs", "identity", "kernel", "tree")),
    *("rcon_wsgi", "rcon_gunicorn", "rcon_celery"),
)
SCOPED = (
    Scoped("told", "exit_reported, outcome_of", ("rcon_plugins", "rcon_celery", "rcon_gunicorn", "rcon_wsgi")),
    Scoped("answer", "max_result", ("rcon_plugins.settings", "rcon_plugins.builtin")),
    Scoped("rest", "shrink", ("rcon_plugins.confinement.monitor",)),
    Scoped("part", "finish", ("rcon_plugins.confinement.monitor",)),
    Scoped("lift", "unthrottle", ("rcon_plugins.confinement.monitor",)),
    Scoped("together", "policy_cgroup", ("rcon_plugins.tree",)),
    Scoped("take", "attach", ("rcon_plugins.tree",)),
    Scoped("taken", "attached", ("rcon_plugins.tree", "rcon_plugins.groups")),
    Scoped("dead", "garbage", ("rcon_plugins.tree",)),
    Scoped("leftovers", "garbage", ("rcon_plugins",)),
    Scoped("changes", "change_log", ("rcon_plugins.tree", "rcon_plugins.kernel")),
    Scoped("share", "allocation", ("rcon_plugins.confinement", "rcon_plugins.tree")),
    Scoped("turn", "reservation", ("rcon_plugins", "rcon_celery", "rcon_gunicorn", "rcon_wsgi")),
    Scoped("again", "redelivery", ("rcon_celery",)),
    Scoped("learning", "retry", ("rcon_celery",)),
    Scoped("ground", "process_state", ("rcon_celery",)),
    Scoped("Body", "TaskCode, Payload", ("rcon_celery",)),
    Scoped("pace", "FrameRateLimiter", ("rcon_wsgi",)),
    Scoped("place", "target, location, entry_directory", _NOT_SETTINGS),
    Scoped("places", "targets, locations", _NOT_SETTINGS),
    Scoped("_nobody", "_do_nothing", ("rcon_plugins",)),
    Scoped("ask", "enter_scope", ("rcon_plugins.tree",)),
    Scoped("asked", "from_systemd, wanted", ("rcon_plugins.tree",)),
    Scoped("lives", "is_alive", ("rcon_plugins.kernel", "rcon_plugins.tree")),
    Scoped("stranger", "other_owner", ("rcon_plugins",)),
)  # fmt: skip
#: Modules and folders that are called otherwise now.
MODULES = {
    "rcon_plugins.defaults": "builtin",
    "rcon_plugins.settings.limit_words": "limit_text",
    "rcon_plugins.changes": "confinement.live_policies",
    "rcon_plugins.cli.run.quick": "fast_path",
    "rcon_plugins.cli.run.words": "completion",
    "rcon_plugins.cli.ending": "exit",
    "rcon_plugins.cli.run.asked": "request",
    "rcon_plugins.cli.asked": "request",
    "rcon_plugins.cli.words": "completion",
    "tests.places": "tests.directories",
    "tests.integrations.celery.office": "sessions",
}
#: Not among the names of the settings, of JSON output, or the words of a help text.
NOT_SHOWN = (
    "max_works",
    "answer",
    "told",
    "said",
    "taken",
    "stranger",
    "attendance",
    "WAITc",
    "HITSm",
    "R:turn",
)

#: In a help text, a server may answer, and words such as Kill are plain English.
NOT_IN_HELP = {*NOT_SHOWN, *(word for word in GONE if "_" in word)} - {"answer"}


class Use(NamedTuple):
    module: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}"


@cache
def uses() -> dict[str, list[Use]]:
    """Return where each identifier is."""
    found: dict[str, list[Use]] = {}
    for module, tree in modules().items():
        for part in module.split("."):
            found.setdefault(part, []).append(Use(module, 1))
        for node in ast.walk(tree):
            for name in identifiers(node):
                found.setdefault(name, []).append(Use(module, getattr(node, "lineno", 1)))
    return found


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__):
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts[1:] if folder == "integrations" else parts)
                found[name.removesuffix(".__init__")] = parsed(path)
    return found


def begins(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def test_there_is_something_to_check() -> None:
    assert {"rcon_plugins", "rcon_wsgi", "examples", "tests"} <= {
        name.partition(".")[0] for name in modules()
    }
    assert sum(map(len, uses().values())) > 10_000


def test_no_old_identifier_is_left() -> None:
    assert [f"{use}: {old} (write {new})" for old, new in GONE.items() for use in uses().get(old, ())] == []


@pytest.mark.parametrize("word", SCOPED, ids=lambda word: word.old)
def test_no_old_word_is_left_where_it_was_a_name_of_ours(word: Scoped) -> None:
    wrong = [str(use) for use in uses().get(word.old, ()) if begins(use.module, word.within)]
    assert wrong == [], f"write {word.new}"


def test_no_old_method_of_instance_is_left() -> None:
    """`leaf` is a common word elsewhere."""
    assert {"together", "leaf", "taken"} & set(dir(Instance)) == set()


def test_no_old_module_is_left() -> None:
    assert [name for name in modules() if begins(name, tuple(MODULES))] == []


def test_no_old_name_is_in_the_settings() -> None:
    def keys(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield key
                yield from keys(value)
        elif isinstance(part, list):
            for value in part:
                yield from keys(value)

    schema = json.loads(json.dumps(json_schema()))
    assert set(keys(schema)) & {*GONE, *NOT_SHOWN} == set()


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, click.Context(inner, info_name=name, parent=context))


def test_no_old_word_is_in_a_help_text() -> None:
    wrong = []
    for name, command in (("rcon", rcon), ("capcon", capcon)):
        for path, text in commands(command, click.Context(command, info_name=name)):
            words = set(re.findall(r"[\w:]+", text))
            wrong += [f"{path} --help: {word}" for word in sorted(words & NOT_IN_HELP)]
    assert wrong == []


def test_no_old_name_is_in_json_output() -> None:
    """Keys of dictionaries, and fields of what is turned into JSON."""
    wrong = []
    for module, tree in modules().items():
        if not begins(module, ("rcon_plugins", "rcon_wsgi", "rcon_gunicorn", "rcon_celery")):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            elif isinstance(node, ast.ClassDef):
                fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
                keys = [field.id for field in fields if isinstance(field, ast.Name)]
            else:
                continue
            wrong += [f"{module}, line {node.lineno}: {key}" for key in keys if key in {*GONE, *NOT_SHOWN}]
    assert wrong == []
