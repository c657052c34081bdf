"""The source code of this project, parsed once for all tests of a run."""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file. Callers share it and do not change it."""
    # The garbage collector would look at the trees of all other files meanwhile, which takes longer than parsing.
    gc.disable()
    try:
        return ast.parse(path.read_bytes(), str(path))
    finally:
        gc.freeze()  # nor need it look at this tree later
        gc.enable()
