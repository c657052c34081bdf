"""Find the block device behind a path: the disk whose traffic the kernel can throttle."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts

_NUMBERS = re.compile(r"(\d{1,4}):(\d{1,7})")


class Device(NamedTuple):
    """A block device by its numbers, as in ``/proc/partitions``."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Device:
        """Return the device of ``MAJ:MIN``, as the kernel prints it."""
        major, _, minor = text.partition(":")
        return cls(int(major), int(minor))

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"


def device_of(text: str) -> Device:
    """Return the whole disk that ``text`` names: a path on it, its device file, or ``"MAJ:MIN"``.

    For a partition, return the disk that contains it: the kernel throttles only whole disks. A device-mapper or loop
    device is a whole disk. For an overlay file system, return the disk of its upper directory. Raises KernelError:
    ENOENT for a path that does not exist, ENODEV for a device that does not exist or a path without a block device
    (tmpfs, network and 9p file systems).
    """
    numbers = _NUMBERS.fullmatch(text)
    if numbers:
        return whole_disk(Device(int(numbers[1]), int(numbers[2])))
    try:
        status = os.stat(text)
    except OSError as error:
        raise KernelError.from_oserror(
            error, path=text, hint="name an existing path on the disk, or the disk as MAJ:MIN (see lsblk)"
        ) from None
    if stat.S_ISBLK(status.st_mode):
        return whole_disk(Device(os.major(status.st_rdev), os.minor(status.st_rdev)))
    device = Device(os.major(status.st_dev), os.minor(status.st_dev))
    if device.major:
        return whole_disk(device)
    return _behind_anonymous(text, device)


def whole_disk(device: Device) -> Device:
    """Return the disk of a partition, or ``device`` itself if it is no partition. Raises KernelError (ENODEV)."""
    entry = f"/sys/dev/block/{device}"
    if not os.path.exists(entry):
        raise KernelError(
            f"there is no block device {device}",
            errno=errno.ENODEV,
            path=entry,
            hint="lsblk shows the numbers of the disks",
        )
    real = os.path.realpath(entry)
    if not os.path.exists(f"{real}/partition"):
        return device
    return Device.parse(files.read(os.path.dirname(real), "dev").strip())


def _behind_anonymous(path: str, device: Device) -> Device:
    """Return the disk behind a file system with an anonymous device number: btrfs, overlay."""
    mount = mounts.mount_of(device.major, device.minor)
    if mount is not None:
        upper = mount.options.get("upperdir")
        if mount.filesystem == "overlay" and upper and os.path.isdir(upper):
            return device_of(upper)
        if mount.source.startswith("/dev/") and os.path.exists(mount.source):
            return device_of(mount.source)
    kind = mount.filesystem if mount is not None else "unknown"
    raise KernelError(
        f"no block device is behind {path} (file system: {kind})",
        errno=errno.ENODEV,
        path=path,
        hint="only traffic to a block device can be limited: name a path on a disk, or the disk as MAJ:MIN",
    )
