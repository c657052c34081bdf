"""``capcon run``: take the requested user and rights, warn if execve(2) would change them, and execute the command."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from rcon_plugins.cli.capcon.show import listed
from rcon_plugins.cli.exit import NOT_EXECUTABLE, NOT_FOUND, Refused, say
from rcon_plugins.cli.options import CAPCON_OPTIONS, parse
from rcon_plugins.cli.program import find_program
from rcon_plugins.cli.request import Request, find_account
from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import landlock, seccomp
from rcon_plugins.kernel.capability import (
    CAP_SYS_ADMIN,
    State,
    drop,
    raise_capability,
    read_state,
    set_no_new_privs,
)
from rcon_plugins.kernel.capability.exec_rule import File, predict, refused_interpreter
from rcon_plugins.kernel.proc import exec_problem, original_environment

#: Devices that most programs write to and that hold no data. --read-only and --write always allow them.
HARMLESS_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/tty")

# Python ignores these signals at its start, and ignored signals stay ignored through execve(2).
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def run(words: Sequence[str]) -> int:
    """Execute the command of the words after ``capcon run`` in place of this process. Does not return.

    Raises `BadUsage`, `HelpRequested`, `Refused` and `RconError`. The command has not run then.
    """
    request = Request.of(*parse(words, CAPCON_OPTIONS))
    program = find_program(request.command[0])
    file = executable(program)
    variables = environment_of(request)
    become(request)
    after = predict(read_state(), file)
    for problem in problems(request, after.state) if after.error is None else ():
        say("capcon", f"warning: {program} {problem} (capcon explain says why)")
    if request.read is not None and request.write is not None:
        landlock.restrict(
            request.read, (*request.write, *(path for path in HARMLESS_DEVICES if Path(path).exists()))
        )
        if seccomp.is_available():
            seccomp.forbid_leaving_cgroups()
        else:
            say("capcon", f"warning: {program} can leave its cgroups: {seccomp.NONE_HERE}")
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, request.command, variables)  # noqa: S606  no shell, on purpose
    except OSError as error:
        raise not_executed(request, program, error) from None


def executable(program: str) -> File:
    """Return the attributes of the program's file that execve(2) reads. Raises `Refused` if execve would fail."""
    try:
        return File.of(program)
    except KernelError as error:
        if error.errno == errno.ENOENT and error.path != program:
            raise Refused(exec_problem(program, error.errno, interpreter=error.path), NOT_FOUND) from None
        raise Refused(str(error), NOT_EXECUTABLE) from None


def environment_of(request: Request) -> dict[bytes, bytes]:
    """Return the environment of the caller; with a requested user, HOME, USER, LOGNAME and SHELL of its account."""
    variables = original_environment()
    if request.identity is None or request.keep_env:
        return variables
    account = find_account(request.identity.uid)
    for name in (b"USER", b"LOGNAME", b"SHELL"):
        variables.pop(name, None)
    variables[b"HOME"] = b"/"
    if account is not None:
        variables[b"HOME"] = os.fsencode(account.pw_dir or "/")
        variables[b"USER"] = variables[b"LOGNAME"] = os.fsencode(account.pw_name)
        variables[b"SHELL"] = os.fsencode(account.pw_shell or "/bin/sh")
    return variables


def become(request: Request) -> None:
    """Change this process to the requested user and capabilities; not the file rules. Raises `CapabilityError`."""
    if request.identity is not None and request.identity.uid != os.geteuid():
        _keep_from_typing(request)
    if request.keep is not None:
        drop(request.identity, request.keep, no_new_privs=request.no_new_privs, ambient=True)
    elif request.no_new_privs:
        set_no_new_privs()


def _keep_from_typing(request: Request) -> None:
    """Keep a command of another user from typing into the shell whose terminal it shares, where this process may."""
    if not seccomp.is_available():
        return
    if CAP_SYS_ADMIN in read_state().permitted:
        raise_capability(CAP_SYS_ADMIN)
    elif request.no_new_privs:
        set_no_new_privs()
    else:
        return
    seccomp.forbid_typing()


def problems(request: Request, after: State) -> list[str]:
    """Return how the state ``after`` execve differs from the request, each as a predicate: ``will not hold …``."""
    found = []
    if request.identity is not None:
        for kind, wanted, ids in (
            ("uid", request.identity.uid, after.uids),
            ("gid", request.identity.gid, after.gids),
        ):
            if others := sorted({number for number in ids if number != wanted}):
                found.append(f"will run with {kind} {', '.join(map(str, others))}, not {wanted} alone")
    if request.keep is not None:
        if missing := request.keep - (after.permitted & after.effective):
            found.append(f"will not hold {listed(missing)}")
        if more := after.permitted - request.keep:
            found.append(f"will hold {listed(more)}, which was not requested")
    return found


def not_executed(request: Request, program: str, error: OSError) -> Refused:
    """Return the error, with the remedy, for a program that exists but that the kernel did not execute."""
    status = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
    remedy = None
    if error.errno in (errno.EACCES, errno.EPERM) and request.read is not None:
        remedy = (
            "add --read-only with its folder and those of its interpreter and libraries, or --read-only /"
        )
    elif error.errno == errno.EPERM:
        remedy = "this process may not gain the capabilities of the file: see capcon explain"
    another, interpreter = request.identity is not None, refused_interpreter(program)
    problem = exec_problem(program, error.errno, as_another=another, interpreter=interpreter, remedy=remedy)
    return Refused(problem, status)
