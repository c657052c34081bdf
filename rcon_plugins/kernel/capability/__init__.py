"""Read and change the capabilities and the identity of a thread.

Each function that changes something acts on the calling thread alone. The package knows no policy and can be used by
itself. Every failure raises `CapabilityError` or another `KernelError`.
"""

from __future__ import annotations

from rcon_plugins.kernel.capability.drop import Identity, drop
from rcon_plugins.kernel.capability.files import (
    FileCapabilities,
    read_file_capabilities,
    write_file_capabilities,
)
from rcon_plugins.kernel.capability.sets import (
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    CAP_SYS_ADMIN,
    CAP_SYS_RESOURCE,
    Capabilities,
    Sets,
    parse_text,
)
from rcon_plugins.kernel.capability.state import (
    SECBIT_KEEP_CAPS,
    SECBIT_KEEP_CAPS_LOCKED,
    SECBIT_NO_CAP_AMBIENT_RAISE,
    SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED,
    SECBIT_NO_SETUID_FIXUP,
    SECBIT_NO_SETUID_FIXUP_LOCKED,
    SECBIT_NOROOT,
    SECBIT_NOROOT_LOCKED,
    Ids,
    State,
    read_state,
)
from rcon_plugins.kernel.capability.thread import (
    drop_bounding,
    raise_capability,
    set_ambient,
    set_capabilities,
    set_gids,
    set_groups,
    set_keep_capabilities,
    set_no_new_privs,
    set_securebits,
    set_uids,
)

__all__ = [
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_RESOURCE",
    "SECBIT_KEEP_CAPS",
    "SECBIT_KEEP_CAPS_LOCKED",
    "SECBIT_NOROOT",
    "SECBIT_NOROOT_LOCKED",
    "SECBIT_NO_CAP_AMBIENT_RAISE",
    "SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED",
    "SECBIT_NO_SETUID_FIXUP",
    "SECBIT_NO_SETUID_FIXUP_LOCKED",
    "Capabilities",
    "FileCapabilities",
    "Identity",
    "Ids",
    "Sets",
    "State",
    "drop",
    "drop_bounding",
    "parse_text",
    "raise_capability",
    "read_file_capabilities",
    "read_state",
    "set_ambient",
    "set_capabilities",
    "set_gids",
    "set_groups",
    "set_keep_capabilities",
    "set_no_new_privs",
    "set_securebits",
    "set_uids",
    "write_file_capabilities",
]
