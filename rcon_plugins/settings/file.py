"""Settings: the policies, the routes, and the bounds of one server, as read from a TOML file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.budget import Budget
from rcon_plugins.settings.conversion import convert, did_you_mean, dotted, explain, one_of, schema_of
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.policy import Policy, PolicyName
from rcon_plugins.settings.routing import Route
from rcon_plugins.settings.toml import read_toml
from rcon_plugins.settings.units import show

#: The longest path of the base, bytes: our own groups below it have paths, too, and PATH_MAX is 4096.
_LONGEST_CGROUP = 1024
_COUNT = Meta(ge=1, le=2**31 - 1)


class _Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plain keys of a settings file."""

    unmatched: Annotated[
        Literal["refuse", "allow"],
        Meta(
            description="What happens to requests, tasks and commands that no route matches.",
            examples=["refuse"],
        ),
    ] = "refuse"
    unmatched_status: Annotated[
        Annotated[int, Meta(ge=400, le=599)],
        Meta(
            description="The HTTP status of a request that is refused because no route matches.",
            examples=[404],
        ),
    ] = 421
    cgroup: Annotated[
        Annotated[str, Meta(pattern="^/")] | None,
        Meta(description="The cgroup to make groups in, as a path below the mount.", examples=["/rcon"]),
    ] = None
    plugins: Annotated[
        tuple[str, ...],
        Meta(description="Installed plugins to use, by entry-point name.", examples=[["audit"]]),
    ] = ()
    executor_started: Annotated[
        Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")] | None,
        Meta(
            description="A function to call in each new executor process, before its first request or task.",
            examples=["shop.database:connect"],
        ),
    ] = None
    confinements: Annotated[
        Annotated[int, _COUNT],
        Meta(
            description="Confinements kept ready; the least recently used are removed first.", examples=[256]
        ),
    ] = 256
    processes: Annotated[
        Annotated[int, _COUNT],
        Meta(description="Most executor processes of one worker.", examples=[64]),
    ] = 64
    threads: Annotated[
        Annotated[int, _COUNT],
        Meta(description="Most executor threads of one worker.", examples=[64]),
    ] = 64
    budget: Annotated[
        Budget | None,
        Meta(description="Memory that may be reserved on the machine at once.", examples=[{"memory": "80%"}]),
    ] = None

    def __post_init__(self) -> None:
        if self.cgroup is not None:
            check_cgroup(self.cgroup)
        for number, plugin in enumerate(self.plugins, 1):
            if not plugin or plugin in self.plugins[: number - 1]:
                problem = "is named twice" if plugin else "is not the name of a plugin"
                raise SettingsError(
                    f"{show(plugin)} {problem}", key=f"plugins[{number}]", value=plugin, hint="leave it out"
                )


class Settings(_Bounds, frozen=True, kw_only=True):
    """The settings of one server. Read them from a file with `load`, or from data with `from_mapping`."""

    policies: Mapping[str, Policy] = {}
    routes: tuple[Route, ...] = ()
    #: The file that the settings were read from, for error messages and the log.
    file: str | None = None

    @property
    def fallback(self) -> str | None:
        """The policy to use if no route matches: ``"default"``, or None if there is no policy of that name."""
        return "default" if "default" in self.policies else None

    def with_policies(self, policies: Iterable[Policy]) -> Self:
        """Return these settings with more policies, from plugins.

        Raises `SettingsError` if a name is taken, or if the policy of a route still does not exist.
        """
        together = dict(self.policies)
        for policy in policies:
            if policy.name in together:
                raise SettingsError(
                    "there is a policy of that name already",
                    key=dotted("policy", policy.name),
                    hint="a plugin contributes policies under names of its own",
                    file=self.file,
                )
            together[policy.name] = policy
        complete = msgspec.structs.replace(self, policies=together)
        for number, route in enumerate(complete.routes, 1):
            _check_policy(route, number, together, self.file)
        return complete


class _File(_Bounds, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a settings file."""

    policy: Annotated[
        Mapping[str, Policy], Meta(description="The policies, by name.", examples=[{"tenant": {"pids": 64}}])
    ] = {}
    route: Annotated[
        tuple[Route, ...],
        Meta(
            description="The policy for each request, task or command; the first match wins.",
            examples=[[{"host": "*.customers.example", "policy": "tenant"}]],
        ),
    ] = ()


def load(path: str | os.PathLike[str]) -> Settings:
    """Return the settings in the TOML file at ``path``.

    Raises `SettingsError`, with file, key, value and remedy, for the first fault.
    """
    file = os.fspath(path)
    return from_mapping(read_toml(file), file=file)


def from_mapping(mapping: Mapping[str, Any], *, file: str | None = None) -> Settings:
    """Return the settings in ``mapping``, which has the structure of the file. Raises like `load`."""
    try:
        return _from_mapping(mapping, file)
    except SettingsError as error:
        error.file = file
        raise


def _from_mapping(mapping: Mapping[str, Any], file: str | None) -> Settings:
    # Key by key, to report the first error in the order of the file.
    plain: dict[str, Any] = {}
    policies: dict[str, Policy] = {}
    routes: tuple[Route, ...] = ()
    for key, value in mapping.items():
        if key == "policy":
            policies = _policies(value)
        elif key == "route":
            routes = _routes(value)
        elif fault := explain({key: value}, _File, ""):
            raise fault
        else:
            plain[key] = value
    bounds = convert(plain, _Bounds)
    if not policies and not bounds.plugins and bounds.unmatched == "refuse":
        raise SettingsError(
            "there is no policy, so everything would be refused",
            key="policy",
            hint='add a [policy.default], or write unmatched = "allow" to run work without limits',
        )
    if not bounds.plugins:
        for number, route in enumerate(routes, 1):
            _check_policy(route, number, policies)
    return Settings(**msgspec.structs.asdict(bounds), policies=policies, routes=routes, file=file)


def _policies(tables: object) -> dict[str, Policy]:
    if not isinstance(tables, Mapping):
        raise SettingsError(f"{show(tables)} is not a table", key="policy", hint="write [policy.NAME]")
    policies = {}
    for name, table in tables.items():
        key = dotted("policy", convert(name, PolicyName, "policy"))
        if not isinstance(table, Mapping):
            raise SettingsError(f"{show(table)} is not a table", key=key, hint=f"write [policy.{name}]")
        policies[name] = Policy.make(name, **table)
    return policies


def _routes(tables: object) -> tuple[Route, ...]:
    if not isinstance(tables, list | tuple):
        raise SettingsError(f"{show(tables)} is not a list of tables", key="route", hint="write [[route]]")
    routes: list[Route] = []
    for number, table in enumerate(tables, 1):
        if routes and not routes[-1].conditions():
            raise SettingsError(
                f"is never reached: route[{number - 1}] has no condition and matches everything",
                key=f"route[{number}]",
                hint="put the route without condition last",
            )
        routes.append(convert(table, Route, f"route[{number}]"))
    return tuple(routes)


def _check_policy(route: Route, number: int, policies: Mapping[str, Policy], file: str | None = None) -> None:
    if route.policy not in policies:
        raise SettingsError(
            f"there is no policy {show(route.policy)}",
            key=f"route[{number}].policy",
            value=route.policy,
            hint=did_you_mean(route.policy, policies) or one_of(policies or ["(none)"]),
            file=file,
        )


def check_cgroup(path: str) -> None:
    """Raise `SettingsError` if the path cannot be the path of a cgroup to make groups in."""
    name = path.strip("/")
    if path.startswith("/sys/fs/cgroup"):
        problem, hint = "begins with the mount", "leave the mount out: as /proc/self/cgroup shows it"
    elif path != f"/{name}" or {"", ".", ".."} & set(name.split("/")) or not name.isprintable():
        problem, hint = "is not the path of a cgroup", 'for example "/rcon"'
    elif len(os.fsencode(path)) > _LONGEST_CGROUP or any(
        len(os.fsencode(part)) > 255 for part in name.split("/")
    ):
        problem, hint = "is too long for the path of a cgroup", 'for example "/rcon"'
    else:
        return
    raise SettingsError(f"{show(path)} {problem}", key="cgroup", value=path, hint=hint)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a settings file, for editors and for checks in a pipeline."""
    schema = schema_of(_File, Memory)
    policy = schema["$defs"]["Policy"]
    del policy["properties"]["name"]  # it is the key of the table
    policy["required"].remove("name")
    definition = schema["$defs"].pop("_File")
    definition["title"] = "Settings of rcon-plugins"
    definition["properties"]["policy"]["propertyNames"] = dict(PolicyName.schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **definition, "$defs": schema["$defs"]}
