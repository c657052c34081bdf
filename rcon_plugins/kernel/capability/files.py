"""Read and write file capabilities: the extended attribute ``security.capability``.

Source: capabilities(7), ``linux/capability.h``.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel.capability.sets import Capabilities

ATTRIBUTE = "security.capability"

_REVISIONS = {0x01000000: (1, 12), 0x02000000: (2, 20), 0x03000000: (3, 24)}  # (version, size)
_REVISION_MASK = 0xFF000000
_EFFECTIVE = 0x000001
_LOW = 0xFFFFFFFF


class FileCapabilities(NamedTuple):
    """The capabilities that a file adds at execve(2). ``effective`` is one bit for all of them.

    With ``rootid`` None (version 2) they apply to every process. With a number (version 3, Linux 4.14) they apply only
    in a user namespace whose uid 0 is that uid outside, and in the namespaces below it.
    """

    permitted: Capabilities = Capabilities()
    inheritable: Capabilities = Capabilities()
    effective: bool = False
    rootid: int | None = None


def decode(data: bytes) -> FileCapabilities:
    """Decode the attribute's bytes, versions 1, 2 and 3. Raises `ValueError` for any other bytes."""
    magic = int.from_bytes(data[:4], "little")
    version, size = _REVISIONS.get(magic & _REVISION_MASK, (0, 0))
    if version == 0 or len(data) != size:
        raise ValueError(f"{len(data)} bytes with the magic {magic:#010x} are no file capabilities")
    words = struct.unpack(f"<{size // 4 - 1}I", data[4:])
    high = (words[2], words[3]) if version > 1 else (0, 0)
    return FileCapabilities(
        permitted=Capabilities(words[0] | high[0] << 32),
        inheritable=Capabilities(words[1] | high[1] << 32),
        effective=bool(magic & _EFFECTIVE),
        rootid=words[4] if version == 3 else None,
    )


def encode(capabilities: FileCapabilities) -> bytes:
    """Return the attribute's bytes: version 2, or version 3 with a ``rootid``.

    Raises `ValueError` if ``rootid`` is not a uid.
    """
    rootid = capabilities.rootid
    if rootid is not None and not 0 <= rootid < _LOW:
        raise ValueError(f"{rootid} is not a uid")
    magic = (0x02000000 if rootid is None else 0x03000000) | (_EFFECTIVE if capabilities.effective else 0)
    permitted, inheritable = capabilities.permitted.mask, capabilities.inheritable.mask
    data = struct.pack("<5I", magic, permitted & _LOW, inheritable & _LOW, permitted >> 32, inheritable >> 32)
    return data if rootid is None else data + struct.pack("<I", rootid)


def read_file_capabilities(file: str | int) -> FileCapabilities | None:
    """Return the capabilities of a path (follows links) or an open descriptor; None if the file has none.

    Where ``rootid`` is uid 0 of the caller's user namespace, the kernel shows version 3 as version 2. Raises
    `KernelError` if the file is inaccessible, or its attribute is malformed (execve(2) then fails with EINVAL).
    """
    try:
        data = os.getxattr(file, ATTRIBUTE)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise KernelError.from_oserror(error, path=str(file)) from None
    try:
        return decode(data)
    except ValueError as error:
        raise KernelError(f"{file}: {error}", path=str(file), hint="set them again with setcap(8)") from None


def write_file_capabilities(file: str | int, capabilities: FileCapabilities | None) -> None:
    """Set the capabilities of a path or an open descriptor; None removes them.

    The kernel removes them when the owner or the content of the file changes later. Needs CAP_SETFCAP effective. Raises
    `CapabilityError` without it, `KernelError` if the file is inaccessible or its file system has no such attribute.
    """
    try:
        if capabilities is not None:
            os.setxattr(file, ATTRIBUTE, encode(capabilities))
        elif read_file_capabilities(file) is not None:
            os.removexattr(file, ATTRIBUTE)
    except KernelError:
        raise
    except OSError as error:
        if error.errno == errno.EPERM:
            raise CapabilityError(
                f"cannot change the file capabilities of {file}: cap_setfcap is not effective",
                errno=errno.EPERM,
                path=str(file),
                hint="run as root",
            ) from None
        hint = "this file system cannot store them" if error.errno == errno.EOPNOTSUPP else None
        raise KernelError.from_oserror(error, path=str(file), hint=hint) from None
