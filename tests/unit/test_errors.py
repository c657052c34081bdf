"""Errors pickle whole, and say what to do."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from rcon_plugins import Usage, errors
from rcon_plugins.outcome import Outcome

USAGE = Usage(wall_seconds=1.5, memory_peak=64)
ALL = [
    errors.RconError("text"),
    errors.SettingsError("wrong", key="policy.p.cpu", value=1, hint="write it like 30%", file="rcon.toml"),
    errors.UnknownGroup("there is no group 'x'", hint="rcon ls lists them"),
    errors.KernelError("no", errno=errno.EBUSY, path="/x", value="1", hint="wait"),
    errors.ControllerUnavailable("no", errno=errno.ENOENT, path="/x", hint="enable it"),
    errors.DelegationError("no", hint="Delegate=yes"),
    errors.CapabilityError("no"),
    errors.ConfinementError("did not run"),
    errors.IdentityRefused("uid 0"),
    errors.Unroutable("no route"),
    errors.ApplicationError("ValueError", "text", "Traceback"),
    errors.Killed("ended", 9, USAGE),
    errors.LimitExceeded("much", policy="p", key="k", limit="memory", usage=USAGE),
    errors.MemoryLimitExceeded("much", policy="p", key="k", limit="each.memory", usage=USAGE),
    errors.SoftMemoryLimitExceeded("nearly", limit="each.memory_soft"),
    errors.TimeLimitExceeded("long", policy="p", limit="each.timeout", usage=USAGE),
    errors.PidsLimitExceeded("many", policy="p", limit="pids"),
    errors.ResultTooLarge("long", policy="p", limit="max_result", usage=USAGE),
    errors.ConcurrencyLimitExceeded("more", policy="p", limit="concurrency"),
]


def test_every_error_is_in_the_list() -> None:
    def below(kind: type[BaseException]) -> set[type[BaseException]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    ours = {kind for kind in below(errors.RconError) if kind.__module__ == "rcon_plugins.errors"}
    assert ours == {type(error) for error in ALL}


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_pickles_whole(error: errors.RconError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert copy.__dict__ == error.__dict__
    if isinstance(error, errors.KernelError):
        assert isinstance(copy, errors.KernelError)
        assert copy.errno == error.errno


def test_messages_name_path_and_remedy() -> None:
    assert str(ALL[1]) == "rcon.toml: policy.p.cpu: wrong (write it like 30%)"
    assert str(ALL[3]) == "no (wait)"
    from_os = errors.KernelError.from_oserror(
        PermissionError(errno.EACCES, "denied"), path="/f", value="0", hint="be root"
    )
    assert str(from_os) == "writing '0' to /f: Permission denied (be root)"
    assert isinstance(from_os, OSError)
    # The remedy stays when another layer names another path.
    again = errors.KernelError.from_oserror(from_os, path="the server")
    assert str(again) == "the server: Permission denied (be root)"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_without_descriptors_the_remedy_is_to_raise_their_limit(number: int) -> None:
    """Whatever the caller knows about the path: the path is not the cause."""
    error = errors.KernelError.from_oserror(OSError(number, ""), path="/f", hint="mount /f")
    assert str(error).startswith(f"/f: {os.strerror(number)} (raise the limit")


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("ok", None),
        ("error", None),
        ("aborted", None),
        ("memory", errors.MemoryLimitExceeded),
        ("timeout", errors.TimeLimitExceeded),
        ("pids", errors.PidsLimitExceeded),
        ("result", errors.ResultTooLarge),
        ("concurrency", errors.ConcurrencyLimitExceeded),
        ("killed", errors.Killed),
        ("refused", errors.ConfinementError),
    ],
)
def test_each_outcome_has_its_error(ending: str, kind: type[errors.RconError] | None) -> None:
    outcome = Outcome(ending=ending, usage=USAGE, policy="p", key="k", limit="l", signal=9, detail="words")  # type: ignore[arg-type]
    error = outcome.error()
    assert type(error) is (kind or type(None))
    if isinstance(error, errors.LimitExceeded):
        assert (error.policy, error.key, error.limit, error.usage) == ("p", "k", "l", USAGE)
        assert outcome.ran_into_limit
    if error is not None:
        assert str(error) == "words"
