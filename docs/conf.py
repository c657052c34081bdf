"""The site: Sphinx over the Markdown pages of the whole repository, so that links work on the site and in the files.

Run it with ``make docs``. The pages stay plain Markdown; this file adds the Python API (autodoc) and the help texts.
"""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import rcon_plugins

project = "rcon-plugins"
author = "the rcon-plugins authors"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx reads this name
release = version = version_of("rcon-plugins")

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**.md",
    "examples/**/README.md",
]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

nitpicky = True
# Only our own names have targets here: those of the standard library and of dependencies are documented elsewhere.
nitpick_ignore_regex = [("py:.*", r"(?!rcon_).*")]
default_role = "py:obj"  # a name in single backquotes in a docstring is a link where this site documents it
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"

html_theme = "furo"
html_title = f"rcon-plugins {release}"
html_extra_path = ["site"]  # index.html at the top, which leads to docs/index.html
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

# The names of the package are imported when first asked for; autodoc looks only at those that are there.
vars(rcon_plugins).update({name: getattr(rcon_plugins, name) for name in rcon_plugins.__all__})


class CommandHelp(Directive):
    """Show what a command prints for ``--help``, as a terminal of 90 columns shows it."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {"class": directives.class_option}

    def run(self) -> list[nodes.Node]:
        words = self.arguments[0].split()
        program = Path(sys.executable).with_name(words[0])
        done = subprocess.run(
            [program, *words[1:], "--help"],
            env={"PATH": "/usr/bin:/bin", "COLUMNS": "90"},
            capture_output=True,
            text=True,
            check=True,
        )
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


def resolve_undocumented(
    _app: Sphinx, _env: object, node: pending_xref, shown: nodes.Node
) -> nodes.Node | None:
    """Show a name of ours that has no entry on this site without a link. Sphinx warns of one that does not exist."""
    target = str(node.get("reftarget", ""))
    if not target.startswith("rcon_"):
        return None
    try:
        pkgutil.resolve_name(re.sub(r"\[.*", "", target))
    except (ImportError, AttributeError):
        return None
    return shown


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
    app.connect("missing-reference", resolve_undocumented)
