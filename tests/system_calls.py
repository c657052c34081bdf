"""Make this process's kernel refuse a system call, as older kernels and the filters of containers do."""

from __future__ import annotations

import ctypes
import errno

from rcon_plugins.kernel.syscalls import prctl

_PR_SET_NO_NEW_PRIVS = 38
_LOAD, _EQUAL, _ANSWER = 0x20, 0x15, 0x06


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction)))


def refuse_system_call(number: int, error: int = errno.ENOSYS) -> None:
    """Answer one system call with an error, for this process and its children: seccomp(2). Irreversible."""
    instructions = (_Instruction * 4)(
        _Instruction(_LOAD, 0, 0, 0),
        _Instruction(_EQUAL, 0, 1, number),
        _Instruction(_ANSWER, 0, 0, 0x00050000 | error),
        _Instruction(_ANSWER, 0, 0, 0x7FFF0000),
    )
    program = _Program(4, ctypes.cast(instructions, ctypes.POINTER(_Instruction)))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if ctypes.CDLL(None).prctl(22, 2, ctypes.byref(program), 0, 0) != 0:
        raise OSError("no seccomp filter")
