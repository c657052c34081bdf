"""Set user, groups and capabilities: once, in an executor process or thread, before it runs any work."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.identity.resolution import kept_capabilities
from rcon_plugins.kernel import capability
from rcon_plugins.settings.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy, target: str, identity: capability.Identity | None) -> None:
    """Take the identity, and keep only the capabilities that the policy names. Acts on the calling thread alone.

    Runs after all other plugins except rlimits, so that those plugins still have the server's privileges. Without an
    identity the user stays, but capabilities are dropped. For a command they survive ``execve`` (ambient set).
    """
    capability.drop(
        identity, kept_capabilities(policy), no_new_privs=policy.no_new_privs, ambient=target == "command"
    )
