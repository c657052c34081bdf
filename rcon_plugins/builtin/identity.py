"""User, groups, capabilities: taken and given up for good, before the first work."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.identity.resolution import kept_capabilities
from rcon_plugins.kernel import capability
from rcon_plugins.settings.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy, place: str, identity: capability.Identity | None) -> None:
    """Take the identity, and keep the capabilities that the policy names, in the calling thread alone.

    Last of all plugins but rlimits: what comes before has what the server has. Without an identity the server's user
    stays, and its capabilities go all the same. Of a command that is about to be executed they outlast that (ambient
    set).
    """
    capability.drop(
        identity, kept_capabilities(policy), no_new_privs=policy.no_new_privs, ambient=place == "command"
    )
