"""Keep the calling thread, and all that it starts later, from leaving its cgroups where Landlock does not see it.

``clone3(CLONE_INTO_CGROUP)`` starts a process in any cgroup whose directory the caller can open to read, if the files
permit a move there (cgroups(7)). No write is involved, so Landlock does not see it. ``fsopen(2)`` gives the root of a
user namespace a mount of the cgroup tree that nothing has made read-only. A filter (seccomp(2)) answers both with
ENOSYS, as kernels do that do not have them: the C library then calls clone(2), and programs call mount(2).

Another filter keeps a program of another user from typing into the shell of the terminal that it shares with it:
ioctl_tty(2), TIOCSTI and TIOCLINUX.

A filter holds for the calling thread and for what it starts later, also after execve(2), and cannot be removed.
"""

from __future__ import annotations

import ctypes
import errno
from functools import cache
from typing import NoReturn

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel.syscalls import syscall, unprivileged

_SET_MODE_FILTER = 1
_FLAG_SPEC_ALLOW = 1 << 2  # Linux 4.17

# The numbers in every ABI of the machines that `syscalls` knows. Calls newer than Linux 5.0 have the same number in all
# of them: x86-64, i386 (int 0x80, sysenter), arm64, 32-bit arm. x32 adds bit 30, which the filter removes; elsewhere no
# call has that bit, so removing it refuses nothing else. So no ABI passes by a filter that does not read `arch`.
_FSOPEN = 430
_CLONE3 = 435
_X32_BIT = 0x40000000

#: By the ABI (linux/audit.h), the numbers of ioctl(2): x86-64 and x32, i386, arm64, 32-bit arm.
_IOCTL = {0xC000003E: (16, 514), 0x40000003: (54,), 0xC00000B7: (29,), 0x40000028: (54,)}
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_LOAD_NUMBER = 0x20  # BPF_LD | BPF_W | BPF_ABS; seccomp_data.nr is at offset 0
_ARCH, _SECOND_ARGUMENT = 4, 24  # the offsets of arch, and of the lower half of args[1]
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ERRNO = 0x00050000
_ALLOW = 0x7FFF0000


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction)))


_FILTER = (_Instruction * 6)(
    _Instruction(_LOAD_NUMBER, 0, 0, 0),
    _Instruction(_AND, 0, 0, ~_X32_BIT & 0xFFFFFFFF),
    _Instruction(_JUMP_IF_EQUAL, 2, 0, _CLONE3),
    _Instruction(_JUMP_IF_EQUAL, 1, 0, _FSOPEN),
    _Instruction(_RETURN, 0, 0, _ALLOW),
    _Instruction(_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
)


def _filter_of_typing() -> list[_Instruction]:
    """Return the filter that answers both requests of ioctl(2) with EPERM, in each ABI."""
    allow = _Instruction(_RETURN, 0, 0, _ALLOW)
    check = [
        _Instruction(_LOAD_NUMBER, 0, 0, _SECOND_ARGUMENT),
        _Instruction(_JUMP_IF_EQUAL, 2, 0, _TIOCSTI),
        _Instruction(_JUMP_IF_EQUAL, 1, 0, _TIOCLINUX),
        allow,
        _Instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    made = [allow, *check]  # from the end, because jumps go forward
    for abi, numbers in _IOCTL.items():
        block = [allow]
        for number in numbers:
            block.insert(0, _Instruction(_JUMP_IF_EQUAL, len(block) + len(made) - len(check), 0, number))
        block[:0] = [_Instruction(_LOAD_NUMBER, 0, 0, 0), _Instruction(_AND, 0, 0, ~_X32_BIT & 0xFFFFFFFF)]
        made[:0] = [_Instruction(_JUMP_IF_EQUAL, 0, len(block), abi), *block]
    return [_Instruction(_LOAD_NUMBER, 0, 0, _ARCH), *made]


# Made here, because it is used in each new process.
_PROGRAM = _Program(len(_FILTER), _FILTER)

#: Why there is no filter, for messages, and the remedy.
NONE_HERE = "this kernel has no seccomp filters"
REMEDY = "a kernel with CONFIG_SECCOMP_FILTER; in a container, a seccomp profile that allows seccomp(2)"


@cache
def is_available() -> bool:
    """Return whether the kernel has seccomp filters and lets this process use them. Source: seccomp(2).

    A kernel with filters reads the program first, and the address 0 is none. The first answer holds for this process
    and its forks: what was found at the start must be there later. Raises `KernelError` for any other error than those
    of a kernel without filters, or of a container's filter.
    """
    try:
        syscall("seccomp", _SET_MODE_FILTER, 0, None)
    except KernelError as error:
        if error.errno == errno.EFAULT:
            return True
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
            return False
        error.hint = REMEDY
        raise
    return True


def forbid_leaving_cgroups() -> None:
    """Answer ``clone3`` and ``fsopen`` with ENOSYS, for the calling thread and what it starts later. Irreversible.

    Raises `CapabilityError` if the thread has neither no_new_privs nor CAP_SYS_ADMIN effective, or if the kernel has no
    filters. Raises `KernelError` for anything else. After an error nothing has changed.
    """
    _add(_PROGRAM)


def forbid_typing() -> None:
    """Refuse to put characters into the input of a terminal, as `forbid_leaving_cgroups` says. Irreversible.

    A program that shares the terminal of a shell could otherwise have the shell execute commands as its user. Raises as
    `forbid_leaving_cgroups`.
    """
    instructions = _filter_of_typing()
    _add(_Program(len(instructions), (_Instruction * len(instructions))(*instructions)))


def _add(program: _Program) -> None:
    try:
        # Without this flag, kernels before 5.16 also make all code of a process with a filter slower.
        _set_filter(program, _FLAG_SPEC_ALLOW)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            _refuse(error)
        try:
            _set_filter(program, 0)
        except KernelError as again:
            _refuse(again)


def _set_filter(program: _Program, flags: int) -> None:
    syscall("seccomp", _SET_MODE_FILTER, flags, ctypes.byref(program))


def _refuse(error: KernelError) -> NoReturn:
    if error.errno == errno.EACCES:
        raise unprivileged(error, "a seccomp filter") from None
    if error.errno in (errno.ENOSYS, errno.EINVAL):
        raise CapabilityError(NONE_HERE, errno=error.errno, path="seccomp", hint=REMEDY) from None
    raise error
