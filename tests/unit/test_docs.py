"""The documentation says what the code does: hooks, settings, examples, links and commands.

Code blocks of README.md and docs/*.md: every `python` block compiles, and runs when `<!-- run -->` stands on the line
before it; those with `<!-- app -->` run in tests/integrations/gunicorn/test_frameworks.py. Every `toml` block is a
settings file that loads, unless `<!-- fragment -->` stands before it.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from rcon_plugins import errors, hookspecs
from rcon_plugins.ending import Ending
from rcon_plugins.executors import executor
from rcon_plugins.settings import file as settings
from tests.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    note: str  # of the comment before it
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    return list(find_blocks(languages))


def find_blocks(languages: tuple[str, ...]) -> Iterator[Block]:
    fence = re.compile(
        r"(?:^<!-- (?P<note>[\w ]+) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
    )
    for page in PAGES:
        text = page.read_text() if page.exists() else ""
        for found in fence.finditer(text):
            if found["language"] in languages:
                line = text.count("\n", 0, found.start("text")) + 1
                yield Block(page, line, found["language"], found["note"] or "", found["text"])


def hooks() -> dict[str, list[str]]:
    """Every hook, with its parameters."""
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    return {name: list(inspect.signature(f).parameters) for name, f in functions if hasattr(f, "rcon_spec")}


def test_every_hook_is_documented_with_its_parameters() -> None:
    page = (ROOT / "docs" / "reference" / "hooks.md").read_text()
    headings = re.findall(r"^#+ `?(rcon_\w+)\(([^)]*)\)`?$", page, re.M)
    documented = {name: [part.strip() for part in parameters.split(",")] for name, parameters in headings}
    assert len(hooks()) >= 6
    assert documented == hooks()


def test_every_error_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    classes = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.RconError)
    }
    assert len(classes) >= 15
    assert sorted(name for name in classes if f"`{name}`" not in page) == []


def test_every_ending_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    documented = re.findall(r"^\| `([a-z]+)` \|", page, re.M)
    assert sorted(documented) == sorted(get_args(Ending))


def test_the_map_quotes_the_code() -> None:
    """docs/architecture.md has the executor's states as the code has them; test_layers.py looks at its table."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    states = re.search(r"^=+ .*?^=+ .*?^=+ [= ]+$", executor.__doc__ or "", re.M | re.S)
    assert states is not None
    assert states[0] in page


def test_every_hook_is_used_in_a_test() -> None:
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef)
    }
    assert sorted(set(hooks()) - defined) == []


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "policy-file.md").read_text()
    schema = settings.json_schema()
    keys = {key for table in [schema, *schema["$defs"].values()] for key in table.get("properties", {})}
    assert {"unmatched", "memory_high", "read_iops", "timeout", "host"} <= keys
    assert sorted(key for key in keys if not re.search(rf"`[^`\n]*\b{re.escape(key)}\b[^`\n]*`", page)) == []


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_settings_in_the_documentation_load(block: Block) -> None:
    data: dict[str, Any] = tomllib.loads(block.text)
    if block.note != "fragment":
        settings.from_mapping(data)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_in_the_documentation_runs(block: Block, tmp_path: Path) -> None:
    compile(block.text, str(block), "exec")
    if block.note != "run":
        return
    script = tmp_path / "block.py"
    script.write_text(block.text)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_notes_on_blocks_are_known() -> None:
    """A misspelt one would be passed over."""
    known = {"python": ("", "run", "app"), "toml": ("", "fragment")}
    assert [str(block) for block in blocks(*known) if block.note not in known[block.language]] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_link_has_a_text(page: Path) -> None:
    """`[](page.md)` shows a title on the site, and nothing anywhere else."""
    assert re.findall(r"(?<!!)\[\s*\]\([^)]*\)", page.read_text()) == []


LONGEST_LINE = 120
#: *A work* and *works* as nouns: it is a request, a task, a command, or a unit of work.
NOUN = re.compile(
    r"\b(?:a|an|one|each|every|single|this|that|no|another|which|any|next|former|other|whose|the) work\b(?! queue)"
    r"|\b(?:the|all|of|many|few|fewer|more|most|these|those|such|its|several|other|some|any|two|three|between|for"
    r"|by|as|or|and|so|\d+) works\b",
    re.I,
)


def prose(page: Path) -> list[str]:
    """Its lines; those of code blocks are empty."""
    blank = re.sub(
        r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.M | re.S
    )
    return blank.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_prose_are_short(page: Path) -> None:
    lines = enumerate(prose(page), 1)
    assert [n for n, line in lines if len(line) > LONGEST_LINE and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_cells_of_tables_are_short(page: Path) -> None:
    most = 20  # words
    cells = [cell for line in prose(page) if line.startswith("|") for cell in re.split(r"(?<!\\)\|", line)]
    assert [cell for cell in cells if len(re.sub(r"\]\([^)]*\)", "]", cell).split()) > most] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_work_is_not_countable(page: Path) -> None:
    lines = enumerate((re.sub(r"`[^`]*`", "", line) for line in prose(page)), 1)
    assert [(n, found[0]) for n, line in lines if (found := NOUN.search(line))] == []


def test_work_as_a_noun_is_found() -> None:
    assert NOUN.search("The works under way end with an error.")
    assert NOUN.search("Choose the policy for one work.")
    assert not NOUN.search("It works on v2, in a work queue, for each unit of work.")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_tables(page: Path) -> None:
    """Each begins with its heads, and each row has as many cells: else it is shown as text, or cut."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    wrong = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        if len(set(cells)) > 1 or not re.fullmatch(r"\|.*\n\|[-|: ]+\|\n(?:.*\n)+", table):
            wrong.append(table.splitlines()[0])
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """The names of its headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text())
    assert [
        f"{name}#{anchor}"
        for name, anchor in links
        if anchor not in anchors(page.parent / name if name else page)
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for names in targets for name in names.split()}
    named = set(re.findall(r"(?:`|^|\n)(?:sudo )?make ([a-z-]+)", page.read_text()))
    assert sorted(named - targets) == []
