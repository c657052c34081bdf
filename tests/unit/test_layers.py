"""Imports point down only, and what a layer keeps to itself is nowhere else."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.identifiers import identifiers
from tests.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
INTEGRATIONS = ROOT / "integrations"
HOMES = {
    "rcon_plugins": ROOT,
    "rcon_wsgi": INTEGRATIONS,
    "rcon_gunicorn": INTEGRATIONS,
    "rcon_celery": INTEGRATIONS,
}

# What each folder, and each module at the root of rcon_plugins, may import of this project, whether at run time or for
# types only: the lowest first. docs/architecture.md quotes this table.
LAYERS: dict[str, tuple[str, ...]] = {
    "work": (),
    "errors": ("work",),
    "kernel": ("errors",),
    "ending": ("kernel",),
    "outcome": ("errors", "ending", "work"),
    "connections": ("errors", "kernel"),
    "settings": ("errors", "work", "kernel"),
    "tree": ("errors", "kernel"),
    "tally": ("errors", "outcome", "kernel", "tree"),
    "identity": ("errors", "kernel", "settings"),
    "groups": ("errors", "kernel", "tree", "tally"),
    "command": ("errors", "ending", "outcome", "work", "kernel", "tree"),
    "hookspecs": ("outcome", "work", "kernel", "settings", "groups"),
    "executors": ("errors", "kernel", "settings", "tree"),
    "builtin": ("errors", "hookspecs", "outcome", "work", "kernel", "settings", "tree", "identity"),
    "confinement": (
        "errors", "ending", "outcome", "work",
        "kernel", "settings", "tree", "tally", "identity", "groups", "executors", "builtin",
    ),
    "cli": (
        "errors", "hookspecs", "work",
        "kernel", "settings", "tree", "tally", "identity", "groups", "command", "builtin", "confinement",
    ),
    "rcon_wsgi": ("connections", "errors", "ending", "outcome", "work", "settings", "executors", "confinement"),
    "rcon_gunicorn": ("errors", "settings", "identity", "executors", "confinement", "rcon_wsgi"),
    "rcon_celery": (
        "errors", "hookspecs", "outcome", "work",
        "settings", "tree", "tally", "groups", "executors", "confinement",
    ),
}  # fmt: skip
# Words of the layers above, which no identifier of the kernel layer has; and names of our tree, which no string has.
WORDS_ABOVE = frozenset(
    {"rcon", "instance", "policy", "policies", "executor", "executors", "confinement", "tenant"}
)
NAMES_OF_OUR_TREE = re.compile(r"\brcon\b|\brcon-|/rcon\b|\b(host|work|attached)/")
LOGGER = "rcon"  # the one name that the kernel layer shares with the rest: its logger's
MOST_LOOSE = 9
# Who may import what is not in the standard library.
ROOMS = {
    "pluggy": ("rcon_plugins",),
    "msgspec": ("rcon_plugins", "rcon_wsgi", "rcon_gunicorn", "rcon_celery"),
    "gunicorn": ("rcon_gunicorn",),
    "gevent": ("rcon_gunicorn", "rcon_celery"),
    "celery": ("rcon_celery",),
    "kombu": ("rcon_celery",),
    "billiard": ("rcon_celery",),
    # Only if the application has loaded them.
    **dict.fromkeys(("opentelemetry", "ddtrace", "sentry_sdk", "structlog"), ("rcon_celery.contexts",)),
    "click": ("rcon_plugins.cli", "rcon_plugins.hookspecs"),  # the hook that adds commands says to what
    "rich": ("rcon_plugins.cli",),
    "jeepney": ("rcon_plugins.tree.systemd",),
}
# Paths of the kernel that are only recognised, in what a person wrote, to tell them what to write instead.
SPOKEN_OF = {("rcon_plugins.settings.file", "/sys/fs/cgroup")}


class Import(NamedTuple):
    importer: str
    imported: str
    line: int
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.imported}"


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    found = {}
    for package, home in HOMES.items():
        for path in sorted((home / package).rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = (path, parsed(path))
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, (path, tree) in modules().items() for found in imports_of(name, path, tree))


def imports_of(name: str, path: Path, tree: ast.Module) -> Iterator[Import]:
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, id(node) in for_types)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (parent, node.module or "") if part)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield Import(
                    name, whole if whole in modules() else source, node.lineno, id(node) in for_types
                )


def within(name: str, packages: tuple[str, ...] | str) -> bool:
    packages = (packages,) if isinstance(packages, str) else packages
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_there_is_something_to_check() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(HOMES)
    assert len(imports()) > 100


def room(name: str) -> str:
    """The folder or module of the table that a module belongs to; "" for rcon_plugins itself, the public face."""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == "rcon_plugins" else top


def test_every_room_is_in_the_table() -> None:
    assert {room(name) for name in modules()} - {""} == set(LAYERS)
    below: set[str] = set()
    for layer, allowed in LAYERS.items():
        assert set(allowed) <= below, f"{layer} may import what stands above it"
        below.add(layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    wrong = [
        str(i)
        for i in imports()
        if room(i.importer) == layer
        and i.imported in modules()
        and room(i.imported) not in (layer, *LAYERS[layer])
    ]
    assert wrong == []


@pytest.mark.parametrize("layer", LAYERS)
def test_the_table_allows_no_more_than_is_imported(layer: str) -> None:
    imported = {room(i.imported) for i in imports() if room(i.importer) == layer and i.imported in modules()}
    assert set(LAYERS[layer]) - imported == set()


def test_the_architecture_page_quotes_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = [
        f"| `{layer}` | {', '.join(f'`{one}`' for one in allowed)} |" for layer, allowed in LAYERS.items()
    ]
    assert [row for row in rows if row not in page] == []


def test_no_imports_in_a_circle() -> None:
    """Neither for types only."""
    graph: dict[str, set[str]] = {}
    for i in imports():
        if i.imported in modules() and i.imported != i.importer:
            graph.setdefault(i.importer, set()).add(i.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_few_modules_are_loose() -> None:
    assert len(list((ROOT / "rcon_plugins").glob("*.py"))) <= MOST_LOOSE


def test_the_kernel_layer_knows_nothing_of_our_tree() -> None:
    wrong = []
    for name, (_, tree) in modules().items():
        if not within(name, "rcon_plugins.kernel"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value != LOGGER and NAMES_OF_OUR_TREE.search(node.value):
                    wrong.append(f"{name}, line {node.lineno}: {node.value!r}")
                continue
            for identifier in identifiers(node):
                if set(re.findall(r"[A-Z]?[a-z]+", identifier.lower())) & WORDS_ABOVE:
                    wrong.append(f"{name}: {identifier}")
    assert wrong == []


def test_dependencies_stay_in_their_rooms() -> None:
    wrong = []
    for i in imports():
        top = i.imported.partition(".")[0]
        if top in sys.stdlib_module_names or top in HOMES or (top == "_typeshed" and i.for_types):
            continue
        if not within(i.importer, ROOMS.get(top, ())):
            wrong.append(str(i))
    assert wrong == []


def test_no_module_imports_the_folder_of_the_integrations() -> None:
    """It is a folder of packages, not a package; installed, there is nothing of that name."""
    assert not (ROOT / "integrations" / "__init__.py").exists()
    wrong = []
    for folder in ("rcon_plugins", "integrations", "tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if b"integrations" in path.read_bytes():  # others cannot import it
                found = imports_of(str(path), path, parsed(path))
                wrong += [str(i) for i in found if within(i.imported, "integrations")]
    assert wrong == []


def test_only_the_kernel_layer_speaks_to_the_kernel() -> None:
    wrong = [
        str(i)
        for i in imports()
        if not within(i.importer, "rcon_plugins.kernel") and within(i.imported, "ctypes")
    ]
    for name, (_, tree) in modules().items():
        if within(name, "rcon_plugins.kernel"):
            continue
        documentation = docstrings(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or id(node) in documentation:
                continue
            text = str(node.value)
            if re.match(r"/(proc|sys)(/|$)", text) and (name, text) not in SPOKEN_OF:
                wrong.append(f"{name}, line {node.lineno}: {text!r}")
    assert wrong == []


def test_what_a_fork_server_runs_closes_descriptors_itself() -> None:
    """gevent's os.close() leaves it to an event loop, which runs in no fork server."""
    rooms = ("rcon_plugins.kernel", "rcon_plugins.builtin", "rcon_plugins.identity", "rcon_plugins.tree")
    found = [
        f"{name}:{node.lineno}"
        for name, (_, tree) in modules().items()
        if within(name, (*rooms, *(f"rcon_plugins.executors.{one}" for one in ("fork_server", "inside"))))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.close"
    ]
    assert found == []


def docstrings(tree: ast.Module) -> set[int]:
    """Every string that stands as a statement of its own."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def test_a_library_neither_prints_nor_exits() -> None:
    wrong = []
    for name, (_, tree) in modules().items():
        if within(name, "rcon_plugins.cli"):
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=called) if ast.unparse(called) in ("print", "sys.exit", "exit", "quit"):
                    wrong.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
                case ast.Raise(exc=ast.expr() as raised) if "SystemExit" in ast.unparse(raised):
                    wrong.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_importing_reads_no_environment() -> None:
    """But for the configuration file that gunicorn is given, whose place it is."""
    wrong = []
    for name, (_, tree) in modules().items():
        if name == "rcon_gunicorn.conf":
            continue
        later = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("environ", "getenv")
                and id(node) not in later
            ):
                wrong.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    assert wrong == []
