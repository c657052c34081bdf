"""Accounts in settings: a name, a number, or the owner of a path with placeholders.

`rcon_plugins.identity.resolution` looks them up on this machine.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, ClassVar, Self

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import Written, did_you_mean
from rcon_plugins.settings.units import show

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_OWNER = "owner:"


class PathTemplate(Written, str):
    """An absolute path with placeholders for attributes of a request, task or command: ``"/srv/{host}/www"``.

    Placeholders are ``{host}``, ``{path}``, ``{method}``, ``{task}``, ``{queue}``, ``{command}``,
    ``{remote_user}``, ``{header:NAME}`` (in any case; kept in small letters) and ``{path:N}`` (the N-th segment of
    the path, from 1). The part before the first placeholder is trusted; everything below it belongs to tenants.
    """

    __slots__ = ()
    names: ClassVar[tuple[str, ...]] = ("host", "path", "method", "task", "queue", "command", "remote_user")
    schema: ClassVar[dict[str, Any]] = {"type": "string", "pattern": r"^/"}

    @classmethod
    def parse(cls, value: object) -> Self:
        if not isinstance(value, str) or not value.startswith("/"):
            hint = 'for example "/srv/{host}"'
            if isinstance(value, str) and value.startswith(_OWNER):
                hint = f'without owner: "{value.removeprefix(_OWNER)}"'
            raise SettingsError(f"{show(value)} is not an absolute path", value=value, hint=hint)
        problem, hint = cls._fault(value)
        if problem:
            raise SettingsError(f"{show(value)} {problem}", value=value, hint=hint)
        return cls(_PLACEHOLDER.sub(lambda found: found[0].lower(), value))

    @classmethod
    def _fault(cls, text: str) -> tuple[str, str]:
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            return "is not a path", "leave out NUL, and what is no character"
        if ".." in text.split("/"):
            return "goes back up", "write the path without .."
        if set("{}") & set(_PLACEHOLDER.sub("", text)):
            return "has a brace without its counterpart", 'a placeholder is written as in "/srv/{host}"'
        for name in _PLACEHOLDER.findall(text):
            if name in cls.names or re.fullmatch(
                r"header:[A-Za-z0-9!#$%&'*+.^_`|~-]+|path:[1-9][0-9]?", name
            ):
                continue
            every = f"one of: {', '.join(cls.names)}, header:NAME, path:N (its N-th segment, from 1)"
            near = did_you_mean(name, cls.names) if ":" not in name else None
            return f"has an unknown placeholder {{{name}}}", near or every
        if re.search(r"[^/]\{path\}", text):  # the path of a request is filled in without its first slash
            return "needs a slash before {path}", f'write "{text.replace("{path}", "/{path}")}"'
        return "", ""

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The names of the placeholders, in order."""
        return tuple(_PLACEHOLDER.findall(self))

    @property
    def trusted(self) -> str:
        """The directory before the first placeholder; the whole path if there is none."""
        return _split(self)[0]

    @property
    def pieces(self) -> tuple[tuple[str, str | None], ...]:
        """The part below `trusted`: pieces of plain text, each with the placeholder that follows it, or None."""
        return _split(self)[1]


@lru_cache(maxsize=1024)
def _split(template: str) -> tuple[str, tuple[tuple[str, str | None], ...]]:
    """Return the trusted part of a template, and the pieces below it. Cached: each request needs it several times."""
    before, brace, _ = template.partition("{")
    if not brace:
        return str(template), ()
    top = before.rpartition("/")[0]
    texts = _PLACEHOLDER.split(template[len(top) + 1 :])
    return top or "/", tuple(zip(texts[::2], [*texts[1::2], None], strict=True))


class Account(Written, str):
    """A user or a group: a name, a number, or ``"owner:PATH"``, the owner (the group) of a path.

    ``PATH`` is a `PathTemplate`. Settings may write a number as a number.
    """

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "integer", "minimum": 0, "maximum": 2**32 - 2},
        ]
    }
    _hint = 'a name, a number, or "owner:/srv/{host}"'

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**32:
            value = str(value)
        if not isinstance(value, str):
            raise SettingsError(f"{show(value)} is not an account", value=value, hint=cls._hint)
        if value.startswith(_OWNER):
            return cls(_OWNER + PathTemplate.parse(value.removeprefix(_OWNER)))
        if re.fullmatch(r"-?\d+", value, re.ASCII):
            # The number above 2**32 - 2 means "no change" to the kernel.
            if len(value) > 10 or not 0 <= int(value) <= 2**32 - 2:
                raise SettingsError(f"{show(value)} is no account's number", value=value, hint=cls._hint)
            return cls(int(value))
        if not re.fullmatch(r"[^\s:/{}+-][^\n:/{}]{0,255}", value) or not value.isprintable():
            hint = f'write "owner:{value}" for the owner of that path' if value.startswith("/") else cls._hint
            raise SettingsError(f"{show(value)} is not an account", value=value, hint=hint)
        return cls(value)

    @property
    def number(self) -> int | None:
        """The uid or gid; None for a name or a path."""
        return _meaning(self)[0]

    @property
    def path(self) -> PathTemplate | None:
        """The path whose owner is the account; None for a name or a number."""
        return _meaning(self)[1]


@lru_cache(maxsize=1024)
def _meaning(account: str) -> tuple[int | None, PathTemplate | None]:
    """Return the number and the path of an account. Cached: each request needs it several times."""
    if account.startswith(_OWNER):
        return None, PathTemplate(account.removeprefix(_OWNER))
    return int(account) if account.isascii() and account.isdigit() else None, None
