"""Sets of capabilities as values, their names, and libcap's text form both ways."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.kernel.capability import Capabilities, Ids, Sets, State, parse_text
from rcon_plugins.kernel.capability.sets import NAMES

MASKS = st.integers(0, (1 << 64) - 1)
SETS = st.builds(Capabilities, MASKS)
LAST = 40


@pytest.fixture(autouse=True)
def kernel_of_41(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts were captured on a kernel whose last capability is CAP_CHECKPOINT_RESTORE."""
    monkeypatch.setattr("rcon_plugins.kernel.capability.sets.last", lambda: LAST)


def test_names() -> None:
    assert len(NAMES) == LAST + 1
    assert NAMES[0] == "cap_chown"
    assert NAMES[7] == "cap_setuid"
    assert NAMES[21] == "cap_sys_admin"
    assert NAMES[LAST] == "cap_checkpoint_restore"
    assert Capabilities.known().names() == NAMES


def test_of_and_parse() -> None:
    wanted = Capabilities(1 << 0 | 1 << 13 | 1 << 41)
    assert Capabilities.of("cap_chown", "NET_RAW", 41) == wanted
    assert Capabilities.parse("net_raw, cap_chown,41") == wanted
    assert str(wanted) == "cap_chown,cap_net_raw,41"
    assert Capabilities.parse("all") == Capabilities.known()
    assert Capabilities.parse("none") == Capabilities.parse("") == Capabilities.none() == Capabilities()
    assert str(Capabilities()) == "none"
    assert eval(repr(wanted)) == wanted


@pytest.mark.parametrize("name", ["cap_", "net_rawx", "64", "-1", "chown net_raw", "cap_cap_chown", "²"])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a capability"):
        Capabilities.parse(name)


@pytest.mark.parametrize("number", [-1, 64, 1000])
def test_an_invalid_number_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="not a capability"):
        Capabilities.of(number)


@pytest.mark.parametrize("mask", [-1, 1 << 64])
def test_an_invalid_mask_is_refused(mask: int) -> None:
    with pytest.raises(ValueError, match="no set"):
        Capabilities(mask)


@given(SETS, SETS)
def test_they_are_sets(one: Capabilities, other: Capabilities) -> None:
    a, b = set(one), set(other)
    assert list(one) == sorted(a)
    assert (set(one | other), set(one & other), set(one - other)) == (a | b, a & b, a - b)
    assert (one <= other, one >= other, one == other) == (a <= b, a >= b, a == b)
    assert (len(one), bool(one)) == (len(a), bool(a))
    assert all((number in one) == (number in a) for number in range(-1, 65))
    assert one & other <= one <= one | other


@given(SETS)
def test_text_round_trip(capabilities: Capabilities) -> None:
    assert Capabilities.parse(str(capabilities)) == capabilities
    assert Capabilities.of(*capabilities.names()) == capabilities
    assert pickle.loads(pickle.dumps(capabilities)) == capabilities
    assert hash(Capabilities(capabilities.mask)) == hash(capabilities)


# What cap_to_text(3) of libcap 2.66 made of what cap_from_text(3) had read: permitted, effective, inheritable.
FULL = (1 << 41) - 1
CAPTURED = [
    ("", "=", (0, 0, 0)),
    ("=", "=", (0, 0, 0)),
    ("all=ep", "=ep", (FULL, FULL, 0)),
    ("=ep", "=ep", (FULL, FULL, 0)),
    ("=ep cap_chown-e", "=ep cap_chown-e", (FULL, FULL - 1, 0)),
    ("cap_net_raw,cap_chown=ep", "cap_chown,cap_net_raw=ep", (0x2001, 0x2001, 0)),
    ("cap_chown=ep cap_kill+i", "cap_kill=i cap_chown+ep", (1, 1, 0x20)),
    ("41=ep", "= 41+ep", (1 << 41, 1 << 41, 0)),
    ("0=ep", "cap_chown=ep", (1, 1, 0)),
    ("0x1=ep", "cap_dac_override=ep", (2, 2, 0)),
    ("010=p", "cap_setpcap=p", (0x100, 0, 0)),
    ("63=p", "= 63+p", (1 << 63, 0, 0)),
    ("cap_chown+ep", "cap_chown=ep", (1, 1, 0)),
    ("cap_chown=", "=", (0, 0, 0)),
    ("cap_chown=e+p", "cap_chown=ep", (1, 1, 0)),
    ("CAP_CHOWN=p", "cap_chown=p", (1, 0, 0)),
    ("cap_chown,all=p", "=p", (FULL, 0, 0)),
    ("=p cap_chown=", "=p cap_chown-p", (FULL - 1, 0, 0)),
    ("all=p cap_chown=i cap_kill-p", "=p cap_chown+i-p cap_kill-p", (FULL - 0x21, 0, 1)),
    ("cap_chown=+ep", "cap_chown=ep", (1, 1, 0)),
    ("cap_chown=-e", "=", (0, 0, 0)),
    ("cap_chown=pp", "cap_chown=p", (1, 0, 0)),
    ("=eip cap_chown,cap_kill-p+i", "=eip cap_chown,cap_kill-p", (FULL - 0x21, FULL, FULL)),
    ("cap_chown-e+p", "cap_chown=p", (1, 0, 0)),
    ("=ep 40-ep", "=ep cap_checkpoint_restore-ep", (FULL >> 1, FULL >> 1, 0)),
    ("=ep 41+ep", "=ep 41+ep", ((1 << 42) - 1, (1 << 42) - 1, 0)),
    ("=ep 41,42-ep", "=ep", (FULL, FULL, 0)),
    ("\tcap_chown=ep\n", "cap_chown=ep", (1, 1, 0)),
    ("cap_chown+e =", "=", (0, 0, 0)),
    ("=p cap_kill-p cap_chown+e", "=p cap_chown+e cap_kill-p", (FULL - 0x20, 1, 0)),
]


@pytest.mark.parametrize(("source", "written", "masks"), CAPTURED, ids=[repr(case[0]) for case in CAPTURED])
def test_as_libcap(source: str, written: str, masks: tuple[int, int, int]) -> None:
    sets = parse_text(source)
    assert tuple(member.mask for member in sets) == masks
    assert sets.text() == written
    assert parse_text(written) == sets


@pytest.mark.parametrize(
    "source",
    [
        "all", "cap_chown", "chown=p", "64=p", "=+e", "cap_chown =p", "cap_chown=p,cap_kill=p", "=e-p", "cap_chown=e=p",
        "none=p", "cap_chown,=p", ",cap_chown=p", "08=p", "0xffp=p", "1x=p", "cap_chown=E", "cap_chown+", "cap_chown-",
        "+p", "-p", "cap_chown=ex", "cap_chown=-", "cap_chown=e+",
    ],
)  # fmt: skip
def test_text_that_libcap_refuses_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"'.*'"):
        parse_text(source)


@given(SETS, SETS, SETS)
def test_libcap_text_round_trip(
    permitted: Capabilities, effective: Capabilities, inheritable: Capabilities
) -> None:
    sets = Sets(permitted, effective, inheritable)
    assert parse_text(sets.text()) == sets


def test_a_state_pickles() -> None:
    some = Capabilities.of("kill", 60)
    state = State(some, some, some, some, some, 0, True, Ids.all(3), Ids(1, 2, 3, 4), (5, 6))
    assert pickle.loads(pickle.dumps(state)) == state
