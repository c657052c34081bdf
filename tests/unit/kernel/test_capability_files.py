"""The bytes of security.capability, and the text of /proc/PID/status."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.kernel.capability import Capabilities, FileCapabilities, Ids, State
from rcon_plugins.kernel.capability.files import decode, encode
from rcon_plugins.kernel.capability.state import parse_status

SETS = st.builds(Capabilities, st.integers(0, (1 << 64) - 1))
ROOTIDS = st.none() | st.integers(0, (1 << 32) - 2)

# What setcap(8) of libcap 2.66 wrote, read with getfattr -e hex.
CAPTURED = {
    "0100000200200000000000000000000000000000": FileCapabilities(Capabilities.of("net_raw"), effective=True),
    "0000000201000000200000000001000000000000": FileCapabilities(
        Capabilities.of("chown", "checkpoint_restore"), Capabilities.of("kill")
    ),
    "0100000300200000000000000000000000000000e8030000": FileCapabilities(
        Capabilities.of("net_raw"), effective=True, rootid=1000
    ),
}
VERSION_1 = struct.pack("<3I", 0x01000001, 1 << 13, 1 << 5)


@pytest.mark.parametrize("data", CAPTURED)
def test_captured(data: str) -> None:
    assert decode(bytes.fromhex(data)) == CAPTURED[data]
    assert encode(CAPTURED[data]).hex() == data


def test_version_1_is_read() -> None:
    assert decode(VERSION_1) == FileCapabilities(Capabilities.of("net_raw"), Capabilities.of("kill"), True)


@given(SETS, SETS, st.booleans(), ROOTIDS)
def test_round_trip(
    permitted: Capabilities, inheritable: Capabilities, effective: bool, rootid: int | None
) -> None:
    capabilities = FileCapabilities(permitted, inheritable, effective, rootid)
    assert decode(encode(capabilities)) == capabilities


@given(st.binary(max_size=32))
def test_anything_else_is_refused(data: bytes) -> None:
    try:
        found = decode(data)
    except ValueError:
        return
    assert len(data) in (12, 20, 24)
    assert found.permitted.mask < 1 << 64


@pytest.mark.parametrize(
    "data",
    [b"", b"\1", VERSION_1[:-1], VERSION_1 + b"\0", b"\0" * 20, struct.pack("<5I", 0x04000001, 0, 0, 0, 0)],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ValueError, match="no file capabilities"):
        decode(data)


@pytest.mark.parametrize("rootid", [-1, 0xFFFFFFFF])
def test_an_invalid_rootid_is_refused(rootid: int) -> None:
    with pytest.raises(ValueError, match="not a uid"):
        encode(FileCapabilities(rootid=rootid))


STATUS = b"""\
Name:	a\\nCapEff:	ffffffffffffffff
Umask:	0022
State:	S (sleeping)
Uid:	1000	0	1000	1001
Gid:	100	101	102	103
FDSize:	64
Groups:	27 4 1000
NoNewPrivs:	1
Seccomp:	0
CapInh:	0000000000000001
CapPrm:	000001ffffffffff
CapEff:	0000000000000002
CapBnd:	000001fffeffffff
CapAmb:	0000000000000000
"""


def test_status() -> None:
    assert parse_status(STATUS, 5) == State(
        permitted=Capabilities((1 << 41) - 1),
        effective=Capabilities.of("dac_override"),
        inheritable=Capabilities.of("chown"),
        ambient=Capabilities(),
        bounding=Capabilities((1 << 41) - 1) - Capabilities.of("sys_resource"),
        securebits=5,
        no_new_privs=True,
        uids=Ids(1000, 0, 1000, 1001),
        gids=Ids(100, 101, 102, 103),
        groups=(4, 27, 1000),
    )
    assert parse_status(STATUS).securebits is None
