"""Predict how execve(2) changes a thread, and why: the rules of capabilities(7) as a pure function.

tests/kernel/capability/test_exec_rule.py compares the predictions with the kernel. Not covered:

- whether the file may be executed at all (permissions, ``noexec``, its format)
- security modules, ptrace(2), binfmt_misc
- a working directory shared with another process (clone(2) with CLONE_FS)
- user namespaces that do not map the owner of the file
"""

from __future__ import annotations

import errno
import itertools
import os
import posix
import stat
from functools import cache
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.capability.files import FileCapabilities, read_file_capabilities
from rcon_plugins.kernel.capability.sets import NAMES, Capabilities
from rcon_plugins.kernel.capability.state import SECBIT_KEEP_CAPS, SECBIT_NOROOT, Ids, State

_FIRST_BYTES = 256  # the kernel reads so many bytes of a file to determine its format (BINPRM_BUF_SIZE)
_MOST_SCRIPTS = 5  # the most interpreters that may be scripts themselves; one more fails with ELOOP

# Linux 6.17 redefines a change of ids ("exec: Correct the permission check for unsafe exec"). Earlier kernels compare
# the effective id with the real one after execve. A process in which they differ then loses its ambient set at each
# execve, and with no_new_privs its effective ids.
_COMPARES_EFFECTIVE_IDS = (6, 17)


class File(NamedTuple):
    """The binary that execve(2) runs in the end. For a script this is its interpreter, whose bits alone count.

    ``mode`` holds the permission bits of stat(2). ``uid`` and ``gid`` are the owner. ``nosuid`` is the option of the
    mount. ``scripts`` lists the scripts whose ``#!`` lines led to this file, starting with the script that was called.
    """

    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    capabilities: FileCapabilities | None = None
    nosuid: bool = False
    scripts: tuple[File, ...] = ()

    @classmethod
    def of(cls, path: str) -> File:
        """Return the file at ``path``, or the interpreter of a script. Follows links; does not search PATH.

        A file that cannot be read counts as a binary. Raises `KernelError` with the errno of execve(2) if the file or
        an interpreter is missing or malformed: ENOENT, ENOEXEC, ELOOP.
        """
        scripts: list[File] = []
        while True:
            file = cls._alone(path)
            interpreter = _interpreter(path)
            if interpreter is None:
                return file._replace(scripts=tuple(scripts))
            scripts.append(file)
            if len(scripts) > _MOST_SCRIPTS:
                raise KernelError(
                    f"{scripts[0].path}: more than {_MOST_SCRIPTS} interpreters are scripts themselves",
                    errno=errno.ELOOP,
                    path=scripts[0].path,
                    hint="name a program after #!",
                )
            path = interpreter

    @classmethod
    def _alone(cls, path: str) -> File:
        try:
            status = os.stat(path)
            flags = os.statvfs(path).f_flag
        except OSError as error:
            raise KernelError.from_oserror(error, path=path) from None
        capabilities = read_file_capabilities(path)
        if capabilities is not None:
            known = Capabilities.known()  # the kernel ignores all others
            capabilities = capabilities._replace(
                permitted=capabilities.permitted & known, inheritable=capabilities.inheritable & known
            )
        return cls(
            path=path,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            capabilities=capabilities,
            nosuid=bool(flags & os.ST_NOSUID),
        )

    @property
    def sets_uid(self) -> bool:
        """Whether the mode has the set-user-ID bit."""
        return bool(self.mode & stat.S_ISUID)

    @property
    def sets_gid(self) -> bool:
        """Whether the mode has the set-group-ID bit. Without group execution that bit means mandatory locking."""
        return bool(self.mode & stat.S_ISGID)

    @property
    def privileged(self) -> bool:
        """Whether the file has a set-ID bit or file capabilities, and so could change ids or capabilities."""
        return self.sets_uid or self.sets_gid or self.capabilities is not None


def _interpreter(path: str) -> str | None:
    """Return the path after ``#!``, as the kernel reads it; None if the file is no script or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        start = os.read(descriptor, _FIRST_BYTES)
    except OSError:
        return None
    finally:
        posix.close(descriptor)
    if not start.startswith(b"#!"):
        return None
    line, newline, _ = start[2:].partition(b"\n")
    words = line.replace(b"\t", b" ").split(b"\0")[0].strip(b" ")
    name, more, _ = words.partition(b" ")
    whole = newline or len(start) < _FIRST_BYTES  # otherwise the line may continue
    if not name or not (whole or more):
        # In a file that ends after #!, the kernel takes the empty path for the interpreter: a directory (EACCES).
        number = errno.ENOEXEC if newline or not whole else errno.EACCES
        raise KernelError(
            f"{path}: no whole path after #! in the first {_FIRST_BYTES} bytes",
            errno=number,
            path=path,
            hint="name an interpreter there",
        )
    return os.fsdecode(name)


def refused_interpreter(program: str) -> str | None:
    """Return the interpreter for which execve(2) refuses a script to this thread: it is missing or not executable.

    None if ``program`` is no script, or all its interpreters can be executed.
    """
    try:
        file = File.of(program)
    except KernelError as error:
        return None if error.path == program else error.path
    paths = (*(script.path for script in file.scripts), file.path)[1:]
    return next((path for path in paths if not _may_execute(path)), None)


def _may_execute(path: str) -> bool:
    return os.access(path, os.X_OK, effective_ids=True) and os.path.isfile(path)


class Step(NamedTuple):
    """One change at execve, and the rule that causes it."""

    what: str
    why: str


class Prediction(NamedTuple):
    """The state after execve, and the steps that led to it.

    With ``error``, execve fails with that errno and changes nothing.
    """

    state: State
    steps: tuple[Step, ...]
    error: int | None = None


def predict(state: State, file: File, *, kernel: tuple[int, int] | None = None) -> Prediction:
    """Return the state of a thread in ``state`` after it executes ``file`` on Linux ``kernel``.

    ``kernel`` is (major, minor); None means the running kernel. Unknown securebits (None: those of another process)
    count as 0.
    """
    return _Execve(state, file, kernel or _running()).run()


class _Execve:
    """Compute one execve in the kernel's order: ids, file capabilities, root, no_new_privs, ambient, effective."""

    def __init__(self, old: State, file: File, kernel: tuple[int, int]) -> None:
        self.old = old
        self.file = file
        self.kernel = kernel
        self.securebits = old.securebits or 0
        self.euid = old.uids.effective
        self.egid = old.gids.effective
        self.permitted = Capabilities.none()
        self.ambient = old.ambient
        self.effective_because = ""  # why the permitted set becomes effective; empty if it does not
        self.has_file_capabilities = False
        self.steps: list[Step] = []

    def run(self) -> Prediction:
        if self.old.securebits is None:
            self.say("the securebits are taken as 0", "those of another process cannot be read")
        self.scripts()
        self.set_user_id()
        self.set_group_id()
        missing = self.file_capabilities()
        if missing:
            self.say(
                "execve fails: EPERM",
                f"safety checking for capability-dumb binaries: the effective bit of the file is set, but of its "
                f"permitted capabilities the process would lack {missing}",
            )
            return Prediction(self.old, tuple(self.steps), errno.EPERM)
        self.root()
        changed = self.ids_changed()
        self.no_new_privs(changed)
        self.saved_ids()
        self.ambient_set(changed)
        self.permitted |= self.ambient
        effective = self.effective_set()
        self.lost()
        if self.securebits & SECBIT_KEEP_CAPS:
            self.say("SECBIT_KEEP_CAPS is cleared", "it does not outlast execve")
        state = self.old._replace(
            permitted=self.permitted,
            effective=effective,
            ambient=self.ambient,
            securebits=None if self.old.securebits is None else self.securebits & ~SECBIT_KEEP_CAPS,
            uids=Ids(self.old.uids.real, self.euid, self.euid, self.euid),
            gids=Ids(self.old.gids.real, self.egid, self.egid, self.egid),
        )
        return Prediction(state, tuple(self.steps))

    def say(self, what: str, why: str) -> None:
        self.steps.append(Step(what, why))

    def scripts(self) -> None:
        followed = [*self.file.scripts, self.file]
        for script, interpreter in itertools.pairwise(followed):
            ignored = " (this one has some)" if script.privileged else ""
            self.say(
                f"{script.path} is a script, run by {interpreter.path}",
                "the set-user-ID and set-group-ID bits and the capabilities of a script are ignored"
                f"{ignored}; those of its interpreter count",
            )

    def set_user_id(self) -> None:
        if not self.file.sets_uid:
            return
        if reason := self.bits_ignored():
            self.say("the set-user-ID bit is ignored", reason)
            return
        self.say(
            f"the effective uid {self.euid} becomes {self.file.uid}",
            "the set-user-ID bit: the owner of the file",
        )
        self.euid = self.file.uid

    def set_group_id(self) -> None:
        if not self.file.sets_gid:
            return
        if reason := self.bits_ignored():
            self.say("the set-group-ID bit is ignored", reason)
        elif not self.file.mode & stat.S_IXGRP:
            self.say(
                "the set-group-ID bit is ignored",
                "the group may not execute the file: then the bit stands for mandatory locking",
            )
        else:
            self.say(
                f"the effective gid {self.egid} becomes {self.file.gid}",
                "the set-group-ID bit: the group of the file",
            )
            self.egid = self.file.gid

    def bits_ignored(self) -> str:
        if self.file.nosuid:
            return "the file system is mounted nosuid"
        return "no_new_privs is set" if self.old.no_new_privs else ""

    def file_capabilities(self) -> Capabilities:
        """Apply the file capabilities. Return the missing ones if the file has the effective bit: execve then fails."""
        capabilities = self.file.capabilities
        if capabilities is None:
            return Capabilities.none()
        if self.file.nosuid:
            self.say("the file capabilities are ignored", "the file system is mounted nosuid")
            return Capabilities.none()
        if capabilities.rootid:
            self.say(
                "the file capabilities are ignored",
                f"they are only for user namespaces whose root is uid {capabilities.rootid} outside",
            )
            return Capabilities.none()
        self.has_file_capabilities = True
        if capabilities.effective:
            self.effective_because = "the effective bit of the file is set"
        self.permitted = (self.old.inheritable & capabilities.inheritable) | (
            capabilities.permitted & self.old.bounding
        )
        self.say(
            f"permitted: {self.permitted}",
            "file capabilities: P'(permitted) = (P(inheritable) & F(inheritable)) | (F(permitted) & P(bounding))",
        )
        missing = capabilities.permitted - self.permitted
        if missing and not capabilities.effective:
            self.say(f"{missing} of the file is not given", "the bounding set lacks it")
        return missing if capabilities.effective else Capabilities.none()

    def root(self) -> None:
        real, effective = self.old.uids.real == 0, self.euid == 0
        if not real and not effective:
            return
        if self.securebits & SECBIT_NOROOT:
            self.say("uid 0 is like any other", "SECBIT_NOROOT is set")
            return
        if self.has_file_capabilities and not real:
            self.say(
                "the effective uid 0 gives nothing more",
                "set-user-ID-root programs that have file capabilities: the process gets just those",
            )
            return
        self.permitted = self.old.inheritable | self.old.bounding
        self.say(
            f"permitted: {_short(self.permitted)}",
            f"the {'effective' if effective else 'real'} uid is 0: the file's sets are taken as all ones, so that "
            "P'(permitted) = P(inheritable) | P(bounding)",
        )
        if effective:
            self.effective_because = "the effective uid is 0"

    def ids_changed(self) -> bool:
        if self.kernel >= _COMPARES_EFFECTIVE_IDS:
            return self.euid != self.old.uids.effective or not (
                self.egid == self.old.gids.fs or self.egid in self.old.groups
            )
        return self.euid != self.old.uids.real or self.egid != self.old.gids.real

    def no_new_privs(self, ids_changed: bool) -> None:
        gained = self.permitted - self.old.permitted
        if not self.old.no_new_privs or not (ids_changed or gained):
            return
        if gained:
            self.say(
                f"{_short(gained)} is not gained", "no_new_privs: execve gives nothing that was not permitted"
            )
        self.permitted &= self.old.permitted
        for kind, effective, real in (
            ("uid", self.euid, self.old.uids.real),
            ("gid", self.egid, self.old.gids.real),
        ):
            if effective != real:
                self.say(
                    f"the effective {kind} {effective} becomes the real one, {real}",
                    "no_new_privs: what would change ids or gain capabilities runs with the real ids",
                )
        self.euid, self.egid = self.old.uids.real, self.old.gids.real

    def saved_ids(self) -> None:
        for kind, ids, effective in (("uid", self.old.uids, self.euid), ("gid", self.old.gids, self.egid)):
            if ids.saved != effective or ids.fs != effective:
                self.say(
                    f"the saved and fs {kind} become {effective}",
                    "execve copies the effective id to the saved set-ID and the file system id",
                )

    def ambient_set(self, ids_changed: bool) -> None:
        if not self.ambient:
            return
        if self.has_file_capabilities:
            self.say("the ambient set is cleared", "the file has capabilities: it is privileged")
        elif ids_changed:
            since = (
                "the program changes the effective uid, or to a group that the process is not in"
                if self.kernel >= _COMPARES_EFFECTIVE_IDS
                else "the effective uid or gid differs from the real one: before Linux 6.17 that counts as a change"
            )
            self.say("the ambient set is cleared", since)
        else:
            self.say(
                f"the ambient capabilities stay: {self.ambient}",
                "the file is not privileged: P'(ambient) = P(ambient), and they are permitted and effective too",
            )
            return
        self.ambient = Capabilities.none()

    def effective_set(self) -> Capabilities:
        effective = self.permitted if self.effective_because else self.ambient
        if self.effective_because:
            self.say(
                "all that is permitted is effective",
                f"{self.effective_because}: P'(effective) = P'(permitted)",
            )
        elif self.permitted != self.ambient:
            why = (
                "only the real uid is 0"
                if self.old.uids.real == 0 and self.euid != 0 and not self.securebits & SECBIT_NOROOT
                else "the effective bit of the file is not set"
            )
            self.say(
                f"{_short(self.permitted - effective)} is permitted and not effective",
                f"{why}: P'(effective) = P'(ambient)",
            )
        return effective

    def lost(self) -> None:
        lost = self.old.permitted - self.permitted
        if lost:
            self.say(
                f"{_short(lost)} is lost",
                "execve keeps only what the file gives, root gets, or is ambient",
            )


def _short(capabilities: Capabilities) -> str:
    everything = Capabilities.of(*NAMES)
    missing = everything - capabilities
    if len(missing) == 0:
        return "all"
    return f"all but {missing}" if len(missing) < len(everything) // 2 else str(capabilities)


@cache
def _running() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
