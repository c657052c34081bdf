"""A program that writes its ``/proc/self/status``, then its securebits in four bytes, and exits.

It loads no C library, so that thousands of executions take only seconds, even in an emulated machine.
"""

from __future__ import annotations

import platform
import struct

# openat(AT_FDCWD, path, O_RDONLY); read(fd, buffer, 16384); write(1, buffer, count); prctl(PR_GET_SECUREBITS);
# write(1, buffer, 4); exit_group(0)
CODE = {
    "x86_64": (
        62,
        """
        4881ec00400000  sub rsp, 0x4000
        bf9cffffff      mov edi, -100
        488d355e000000  lea rsi, [rip+path]
        31d2            xor edx, edx
        b801010000      mov eax, 257
        0f05            syscall
        89c7            mov edi, eax
        4889e6          mov rsi, rsp
        ba00400000      mov edx, 0x4000
        31c0            xor eax, eax
        0f05            syscall
        89c2            mov edx, eax
        4889e6          mov rsi, rsp
        bf01000000      mov edi, 1
        b801000000      mov eax, 1
        0f05            syscall
        bf1b000000      mov edi, 27
        31f6            xor esi, esi
        31d2            xor edx, edx
        4531d2          xor r10d, r10d
        4531c0          xor r8d, r8d
        b89d000000      mov eax, 157
        0f05            syscall
        890424          mov [rsp], eax
        ba04000000      mov edx, 4
        4889e6          mov rsi, rsp
        bf01000000      mov edi, 1
        b801000000      mov eax, 1
        0f05            syscall
        31ff            xor edi, edi
        b8e7000000      mov eax, 231
        0f05            syscall
        """,
    ),
    "aarch64": (
        183,
        """
        ff1340d1  sub sp, sp, #0x4000
        600c8092  mov x0, #-100
        a1030010  adr x1, path
        020080d2  mov x2, #0
        080780d2  mov x8, #56
        010000d4  svc #0
        e1030091  mov x1, sp
        020088d2  mov x2, #0x4000
        e80780d2  mov x8, #63
        010000d4  svc #0
        e20300aa  mov x2, x0
        e1030091  mov x1, sp
        200080d2  mov x0, #1
        080880d2  mov x8, #64
        010000d4  svc #0
        600380d2  mov x0, #27
        010080d2  mov x1, #0
        020080d2  mov x2, #0
        030080d2  mov x3, #0
        040080d2  mov x4, #0
        e81480d2  mov x8, #167
        010000d4  svc #0
        e00300b9  str w0, [sp]
        820080d2  mov x2, #4
        e1030091  mov x1, sp
        200080d2  mov x0, #1
        080880d2  mov x8, #64
        010000d4  svc #0
        000080d2  mov x0, #0
        c80b80d2  mov x8, #94
        010000d4  svc #0
        """,
    ),
}
PATH = b"/proc/self/status\0"
ADDRESS = 0x400000
HEADERS = 64 + 56


def program() -> bytes:
    """Return the content of the file for this machine: an ELF with one segment."""
    machine, listing = CODE[platform.machine()]
    code = b"".join(bytes.fromhex(line.split()[0]) for line in listing.split("\n") if line.strip()) + PATH
    size = HEADERS + len(code)
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    elf = struct.pack(
        "<HHIQQQIHHHHHH", 2, machine, 1, ADDRESS + HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )  # EXEC, one program header
    segment = struct.pack(
        "<IIQQQQQQ", 1, 5, 0, ADDRESS, ADDRESS, size, size, 0x10000
    )  # LOAD, read and execute
    return identity + elf + segment + code
