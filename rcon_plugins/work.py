"""Work: one request, task or command to be confined."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Work(NamedTuple):
    """One request, task or command to be confined.

    ``kind`` is ``"request"``, ``"task"``, ``"command"`` or ``"call"``. ``name`` is for people: the request
    line, the task's name, the command. ``attributes`` is what routes match and ``per`` takes its key from:
    ``host``, ``path`` and ``method`` of a request, ``task`` and ``queue`` of a task, ``command``. It may be
    a lazy mapping; a missing attribute is a missing key, never an empty string.
    """

    kind: str
    name: str
    attributes: Mapping[str, str] = _NOTHING

    def quoted(self) -> str:
        """The name in quotes, with the host of a request: routes look at that first, and its name does not tell it."""
        host = self.attributes.get("host")
        return repr(self.name) if host is None else f"{self.name!r} of the host {host!r}"
