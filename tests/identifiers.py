"""The identifiers of parsed source code."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def identifiers(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node uses or defines, without those of its children."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.keyword(arg=str(name)):
            yield name
        case ast.alias(name=name, asname=other):
            yield from name.split(".")
            if other:
                yield other
