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

ROOT = Path(__file__).resolve().parents[2]
INTEGRATIONS = ROOT / "integrations"
HOMES = {
    "rcon_plugins": ROOT,
    "rcon_wsgi": INTEGRATIONS,
    "rcon_gunicorn": INTEGRATIONS,
    "rcon_celery": INTEGRATIONS,
}

# What a package may not import, whether at run time or for types only.
FORBIDDEN = {
    "rcon_plugins": ("rcon_wsgi", "rcon_gunicorn", "rcon_celery"),
    "rcon_plugins.kernel": ("rcon_plugins",),
    "rcon_plugins.settings": ("rcon_plugins",),
    "rcon_plugins.builtin": ("rcon_plugins.confinement", "rcon_plugins.executors", "rcon_plugins.cli"),
    "rcon_plugins.executors": ("rcon_plugins.confinement", "rcon_plugins.builtin", "rcon_plugins.cli"),
    "rcon_wsgi": ("rcon_plugins.kernel", "rcon_plugins.cli", "rcon_gunicorn", "rcon_celery"),
    "rcon_gunicorn": ("rcon_plugins.kernel", "rcon_plugins.cli", "rcon_celery"),
    "rcon_celery": ("rcon_plugins.kernel", "rcon_plugins.cli", "rcon_wsgi", "rcon_gunicorn"),
}
# The exceptions: the errors stand below everything; a route is asked for a work.
ALLOWED = {
    "rcon_plugins.kernel": ("rcon_plugins.kernel", "rcon_plugins.errors"),
    "rcon_plugins.settings": ("rcon_plugins.settings", "rcon_plugins.errors", "rcon_plugins.work"),
}
# Who may import what is not in the standard library.
ROOMS = {
    "pluggy": ("rcon_plugins",),
    "msgspec": ("rcon_plugins", "rcon_wsgi", "rcon_gunicorn", "rcon_celery"),
    "gunicorn": ("rcon_gunicorn",),
    "gevent": ("rcon_gunicorn", "rcon_celery"),
    "celery": ("rcon_celery",),
    "kombu": ("rcon_celery",),
    "billiard": ("rcon_celery",),
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
            found[name] = (path, ast.parse(path.read_bytes(), str(path)))
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


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_down(package: str) -> None:
    allowed = ALLOWED.get(package, ())
    wrong = [i for i in imports() if within(i.importer, package) and within(i.imported, FORBIDDEN[package])]
    assert [str(i) for i in wrong if not within(i.imported, allowed)] == []


def test_only_the_commands_import_the_commands() -> None:
    assert [
        str(i) for i in imports() if within(i.imported, "rcon_plugins.cli") and ".cli" not in i.importer
    ] == []


def test_no_imports_in_a_circle() -> None:
    """Neither by way of a package that shows what is below it."""
    graph: dict[str, set[str]] = {}
    for i in imports():
        if not i.for_types and i.imported in modules() and i.imported != i.importer:
            graph.setdefault(i.importer, set()).add(i.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_dependencies_stay_in_their_rooms() -> None:
    wrong = []
    for i in imports():
        top = i.imported.partition(".")[0]
        if top in sys.stdlib_module_names or top in HOMES or (top == "_typeshed" and i.for_types):
            continue
        if not within(i.importer, ROOMS.get(top, ())):
            wrong.append(str(i))
    assert wrong == []


def test_nobody_imports_the_folder_of_the_integrations() -> None:
    """It is a folder of packages, not a package; installed, there is nothing of that name."""
    assert not (ROOT / "integrations" / "__init__.py").exists()
    wrong = []
    for folder in ("rcon_plugins", "integrations", "tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_bytes())
            wrong += [str(i) for i in imports_of(str(path), path, tree) if within(i.imported, "integrations")]
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
