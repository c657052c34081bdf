"""``capcon run``: become what was asked, say if execve(2) would change that, and execute the command."""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path

from rcon_plugins.cli.capcon.show import listed
from rcon_plugins.cli.exit import NOT_EXECUTABLE, NOT_FOUND, Refused, say
from rcon_plugins.cli.request import Asked, find_account
from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import State, drop, read_state, set_no_new_privs
from rcon_plugins.kernel.capability.exec_rule import File, predict
from rcon_plugins.kernel.proc import exec_remedy, original_environment

#: Devices that hold nothing and that nearly every program writes to: allowed along with any --read-only and --write.
HARMLESS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/tty")

# Python ignores these at its start, and what is ignored stays so through execve(2).
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def run(asked: Asked) -> int:
    """Execute the command in place of this process. Does not return; raises `Refused` or `RconError`."""
    program = find(asked.command[0])
    file = read_process(program)
    variables = variables_of(asked)
    take(asked)
    after = predict(read_state(), file)
    for problem in problems(asked, after.state) if after.error is None else ():
        say("capcon", f"warning: {program} {problem} (capcon explain says why)")
    if asked.read is not None and asked.write is not None:
        landlock.restrict(asked.read, (*asked.write, *(path for path in HARMLESS if Path(path).exists())))
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, asked.command, variables)  # noqa: S606  no shell, on purpose
    except OSError as error:
        raise not_executed(asked, program, error) from None


def find(command: str) -> str:
    """The path of the program, looked for as a shell does, by the caller. Raises `Refused`."""
    found = None
    for folder in [""] if "/" in command else os.get_exec_path():
        path = f"{folder}/{command}" if folder else command
        mode = _mode(path)
        if stat.S_ISREG(mode):
            if os.access(path, os.X_OK):
                return path
            found = found or path
        elif "/" in command and mode:
            raise Refused(f"{path} is no file that could be executed", NOT_EXECUTABLE)
    if found:
        raise Refused(f"{found} is not executable (chmod +x, or run it with its interpreter)", NOT_EXECUTABLE)
    where = "there is no such file" if "/" in command else "in no folder of PATH"
    raise Refused(f"{command}: not found ({where})", NOT_FOUND)


def read_process(program: str) -> File:
    """What execve(2) will see. Raises `Refused` where it would fail for what it sees."""
    try:
        return File.of(program)
    except KernelError as error:
        if error.errno == errno.ENOENT and error.path != program:
            raise Refused(
                f"{program}: its interpreter {error.path} is missing (install it)", NOT_FOUND
            ) from None
        raise Refused(str(error), NOT_EXECUTABLE) from None


def _mode(path: str) -> int:
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):  # ValueError: it holds a null character
        return 0


def variables_of(asked: Asked) -> dict[bytes, bytes]:
    """The caller's environment, with the account's HOME, USER, LOGNAME and SHELL where another user is asked for."""
    variables = original_environment()
    if asked.identity is None or asked.keep_env:
        return variables
    account = find_account(asked.identity.uid)
    for name in (b"USER", b"LOGNAME", b"SHELL"):
        variables.pop(name, None)
    variables[b"HOME"] = b"/"
    if account is not None:
        variables[b"HOME"] = os.fsencode(account.pw_dir or "/")
        variables[b"USER"] = variables[b"LOGNAME"] = os.fsencode(account.pw_name)
        variables[b"SHELL"] = os.fsencode(account.pw_shell or "/bin/sh")
    return variables


def take(asked: Asked) -> None:
    """Become what was asked, for good, all but the files. Raises `CapabilityError`."""
    if asked.keep is not None:
        drop(asked.identity, asked.keep, no_new_privs=asked.no_new_privs, ambient=True)
    elif asked.no_new_privs:
        set_no_new_privs()


def problems(asked: Asked, after: State) -> list[str]:
    """In what ``after``, the state of the command, is not what was asked; each goes on from the command's name."""
    found = []
    if asked.identity is not None:
        for kind, wanted, ids in (
            ("uid", asked.identity.uid, after.uids),
            ("gid", asked.identity.gid, after.gids),
        ):
            if others := sorted({number for number in ids if number != wanted}):
                found.append(f"will run with {kind} {', '.join(map(str, others))}, not {wanted} alone")
    if asked.keep is not None:
        if missing := asked.keep - (after.permitted & after.effective):
            found.append(f"will not hold {listed(missing)}")
        if more := after.permitted - asked.keep:
            found.append(f"will hold {listed(more)}, which was not asked for")
    return found


def not_executed(asked: Asked, program: str, error: OSError) -> Refused:
    """What to say of a program that was there and that the kernel did not execute."""
    reason = os.strerror(error.errno or errno.EIO)
    status = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
    if error.errno in (errno.EACCES, errno.EPERM) and asked.read is not None:
        hint = "add --read-only with its folder and those of its interpreter and libraries, or --read-only /"
    elif error.errno == errno.EPERM:
        hint = "its file capabilities are more than this process may hold: see capcon explain"
    else:
        hint = exec_remedy(error.errno, as_another=asked.identity is not None)
    return Refused(f"{program}: {reason}" + (f" ({hint})" if hint else ""), status)
