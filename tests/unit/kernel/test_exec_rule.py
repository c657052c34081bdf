"""The rule of execve, case by case as capabilities(7) tells it. tests/kernel compares it with the kernel."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from rcon_plugins.kernel.capability import (
    SECBIT_KEEP_CAPS,
    SECBIT_NO_SETUID_FIXUP,
    SECBIT_NOROOT,
    Capabilities,
    FileCapabilities,
    Ids,
    State,
)
from rcon_plugins.kernel.capability.exec_rule import File, Prediction, predict

NONE = Capabilities()
ALL = Capabilities((1 << 41) - 1)
RAW, KILL = Capabilities.of("net_raw"), Capabilities.of("kill")
USER = State(NONE, NONE, NONE, NONE, ALL, 0, False, Ids.all(1000), Ids.all(1000), (4, 27))
ROOT = State(ALL, ALL, NONE, NONE, ALL, 0, False, Ids.all(0), Ids.all(0), ())
AMBIENT = USER._replace(permitted=RAW, effective=RAW, inheritable=RAW, ambient=RAW)
PING = File("/bin/ping", capabilities=FileCapabilities(RAW, NONE, effective=True))
PLAIN = File("/bin/cat")
SETUID = File("/bin/su", mode=0o4755)


def after(state: State, file: File, kernel: tuple[int, int] = (6, 18)) -> State:
    prediction = predict(state, file, kernel=kernel)
    assert prediction.error is None
    return prediction.state


def why(prediction: Prediction) -> str:
    return "\n".join(f"{step.what}: {step.why}" for step in prediction.steps)


def test_nothing_special() -> None:
    prediction = predict(USER, PLAIN, kernel=(6, 18))
    assert prediction == Prediction(USER, ())


def test_root_stays_root() -> None:
    prediction = predict(ROOT, PLAIN, kernel=(6, 18))
    assert prediction.state == ROOT
    assert "taken as all ones" in why(prediction)


def test_root_gets_back_what_it_dropped_but_within_the_bounding_set() -> None:
    assert after(ROOT._replace(permitted=NONE, effective=NONE), PLAIN) == ROOT
    bound = after(ROOT._replace(bounding=KILL, inheritable=RAW), PLAIN)
    assert bound.permitted == bound.effective == KILL | RAW


def test_setuid_root() -> None:
    state = after(USER, SETUID)
    assert state.uids == Ids(1000, 0, 0, 0)
    assert state.permitted == state.effective == ALL
    assert state.gids == USER.gids
    assert state.groups == USER.groups


def test_setuid_to_another_user() -> None:
    state = after(AMBIENT, SETUID._replace(uid=5))
    assert state.uids == Ids(1000, 5, 5, 5)
    assert state.permitted == state.effective == state.ambient == NONE
    assert state.inheritable == RAW


def test_only_the_real_uid_is_root() -> None:
    state = after(ROOT, SETUID._replace(uid=1000))
    assert state.uids == Ids(0, 1000, 1000, 1000)
    assert state.permitted == ALL
    assert state.effective == NONE


def test_setgid() -> None:
    assert after(USER, File("/x", mode=0o2755, gid=9)).gids == Ids(1000, 9, 9, 9)
    locking = predict(USER, File("/x", mode=0o2745, gid=9), kernel=(6, 18))
    assert locking.state == USER
    assert "mandatory locking" in why(locking)


def test_file_capabilities() -> None:
    prediction = predict(USER, PING, kernel=(6, 18))
    assert prediction.state.permitted == prediction.state.effective == RAW
    assert "(F(permitted) & P(bounding))" in why(prediction)
    without_bit = after(USER, PING._replace(capabilities=FileCapabilities(RAW)))
    assert (without_bit.permitted, without_bit.effective) == (RAW, NONE)
    inheriting = FileCapabilities(NONE, RAW | KILL, True)
    assert after(USER._replace(inheritable=KILL), PING._replace(capabilities=inheriting)).permitted == KILL


def test_capability_dumb_binaries() -> None:
    bound = USER._replace(bounding=ALL - RAW)
    prediction = predict(bound, PING, kernel=(6, 18))
    assert (prediction.state, prediction.error) == (bound, errno.EPERM)
    assert "capability-dumb" in why(prediction)
    assert "cap_net_raw" in why(prediction)
    assert after(bound, PING._replace(capabilities=FileCapabilities(RAW))).permitted == NONE
    assert predict(bound._replace(inheritable=RAW), PING._replace(
        capabilities=FileCapabilities(RAW, RAW, True)), kernel=(6, 18)).error is None  # fmt: skip


def test_setuid_root_with_file_capabilities() -> None:
    file = SETUID._replace(capabilities=FileCapabilities(RAW, effective=True))
    assert after(USER, file).permitted == RAW
    assert after(ROOT, file).permitted == ALL
    assert after(USER, SETUID._replace(capabilities=FileCapabilities())).permitted == NONE


def test_another_namespaces_file_capabilities() -> None:
    other = FileCapabilities(RAW, effective=True, rootid=1000)
    prediction = predict(AMBIENT, PING._replace(capabilities=other), kernel=(6, 18))
    assert prediction.state == AMBIENT
    assert "uid 1000 outside" in why(prediction)


@pytest.mark.parametrize(
    "file", [SETUID, PING, File("/x", mode=0o2755, gid=9)], ids=lambda file: str(file.path)
)
def test_nosuid_ignores_all_of_it(file: File) -> None:
    prediction = predict(AMBIENT, file._replace(nosuid=True), kernel=(6, 18))
    assert prediction.state == AMBIENT
    assert "nosuid" in why(prediction)


def test_no_new_privs() -> None:
    nnp = AMBIENT._replace(no_new_privs=True)
    assert after(nnp, SETUID) == nnp
    gaining = predict(nnp, PING._replace(capabilities=FileCapabilities(KILL, effective=True)), kernel=(6, 18))
    assert gaining.state.permitted == gaining.state.ambient == NONE
    assert "gives nothing that was not permitted" in why(gaining)
    root = after(ROOT._replace(permitted=KILL, effective=KILL, no_new_privs=True), PLAIN)
    assert root.permitted == root.effective == KILL


def test_ambient() -> None:
    prediction = predict(AMBIENT, PLAIN, kernel=(6, 18))
    assert prediction.state == AMBIENT
    assert "P'(ambient) = P(ambient)" in why(prediction)
    for file in (SETUID._replace(uid=5), PING, File("/x", mode=0o2755, gid=9)):
        assert after(AMBIENT, file).ambient == NONE
    held = predict(USER._replace(permitted=RAW, effective=RAW), PLAIN, kernel=(6, 18))
    assert held.state.permitted == NONE
    assert "cap_net_raw is lost" in why(held)


@pytest.mark.parametrize("bits", [SECBIT_NOROOT, SECBIT_NOROOT | SECBIT_NO_SETUID_FIXUP])
def test_noroot(bits: int) -> None:
    prediction = predict(ROOT._replace(securebits=bits), PLAIN, kernel=(6, 18))
    assert prediction.state.permitted == NONE
    assert prediction.state.securebits == bits
    assert "SECBIT_NOROOT" in why(prediction)


def test_keep_caps_is_cleared() -> None:
    assert after(USER._replace(securebits=SECBIT_KEEP_CAPS | 32), PLAIN).securebits == 32


def test_unknown_securebits() -> None:
    prediction = predict(ROOT._replace(securebits=None), PLAIN, kernel=(6, 18))
    assert prediction.state == ROOT._replace(securebits=None)
    assert "taken as 0" in why(prediction)


def test_scripts() -> None:
    script = File("/s", mode=0o4755, capabilities=FileCapabilities(KILL, effective=True))
    prediction = predict(USER, PLAIN._replace(scripts=(script,)), kernel=(6, 18))
    assert prediction.state == USER
    assert "/s is a script, run by /bin/cat" in why(prediction)
    assert "this one has some" in why(prediction)
    assert after(USER, SETUID._replace(scripts=(PLAIN,))).uids.effective == 0


# An effective uid that differs from the real one already, an ordinary file.
DIFFERENT: list[tuple[Any, Any]] = [
    ((6, 1), NONE),
    ((6, 16), NONE),
    ((6, 17), RAW),
    ((7, 0), RAW),
]


@pytest.mark.parametrize(("kernel", "ambient"), DIFFERENT)
def test_the_kernel_version_decides_what_a_change_of_ids_is(
    kernel: tuple[int, int], ambient: Capabilities
) -> None:
    different = AMBIENT._replace(uids=Ids(1000, 5, 5, 5))
    assert after(different, PLAIN, kernel).ambient == ambient
    nnp = after(different._replace(no_new_privs=True), PLAIN, kernel)
    assert nnp.uids == (Ids(1000, 5, 5, 5) if ambient else Ids.all(1000))


@pytest.mark.parametrize(("kernel", "ambient"), DIFFERENT)
def test_a_group_that_the_process_is_in(kernel: tuple[int, int], ambient: Capabilities) -> None:
    own = File("/x", mode=0o2755, gid=27)
    assert after(AMBIENT, own, kernel).ambient == ambient
    assert after(AMBIENT, own, kernel).gids == Ids(1000, 27, 27, 27)
