"""User, groups and capabilities: a process or thread takes them for good before it runs anything."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.identity.resolution import kept_capabilities
from rcon_plugins.kernel import capability
from rcon_plugins.settings.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy, place: str, identity: capability.Identity | None) -> None:
    """Take the identity, and keep only the capabilities that the policy names, in the calling thread alone.

    Runs after all other plugins but rlimits, so that they have the privileges of the server. Without an identity the
    user stays, and the capabilities are dropped all the same. For a command they survive ``execve`` (ambient set).
    """
    capability.drop(
        identity, kept_capabilities(policy), no_new_privs=policy.no_new_privs, ambient=place == "command"
    )
