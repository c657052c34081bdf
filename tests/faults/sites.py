"""Find each call of the kernel in the source, and load the modules so that `touch` runs at each.

The list comes from the syntax tree, so a new call is in it as soon as it is written. A call is an attribute of a module
of the standard library that makes system calls (``os.open``), a function of the C library (``_libc().mount``), a method
of a socket or a poll object, the start of a thread, or the built-in ``open``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import marshal
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple, cast

ROOT = Path(__file__).resolve().parent.parent.parent
#: The code of the changed files.
_KEPT = ROOT / "build" / "faults"
_CORE, _INTEGRATIONS = ROOT / "rcon_plugins", ROOT / "integrations"
#: The parts of ``rcon_plugins``, and the packages of ``integrations``, whose calls are found.
PARTS = (
    "kernel", "tree", "executors", "confinement", "identity", "builtin", "command", "tally", "connections",
)  # fmt: skip
ADAPTERS = ("rcon_wsgi", "rcon_gunicorn", "rcon_celery")

_MODULES = {
    "os", "posix", "fcntl", "signal", "_signal", "_socket", "socket", "resource", "select", "pwd", "grp", "_thread",
    "descriptors",  # ours: each place that has one made counts, not just the one that makes it
}  # fmt: skip
_PATH_FUNCTIONS = {"exists", "realpath", "isdir", "isfile", "lexists", "samefile", "islink"}
_PATH_METHODS = {"read_text", "read_bytes", "write_text", "iterdir", "lstat", "is_dir", "is_file", "unlink"}
_SOCKET_METHODS = {"send", "sendall", "sendmsg", "recv", "recvmsg", "shutdown", "setsockopt"}
#: The names under which the source holds sockets and poll objects. `Channel.send` and the like are none.
_SOCKETS = {"self._control", "control", "self._socket", "inner", "end", "peer", "sock", "socket.socket"}
_POLLS = {"poll", "self._poll", "waiting"}
#: The names under which the source starts a thread.
_THREADS = {"threading.Thread.start", "thread.start"}

#: Functions that make no system call, or one that cannot fail as it is used here.
CANNOT_FAIL = {
    **dict.fromkeys(
        (
            "os.fsencode", "os.fsdecode", "os.fspath", "os.strerror", "os.major", "os.minor", "os.cpu_count",
            "os.WIFEXITED", "os.WIFSIGNALED", "os.WTERMSIG", "os.WEXITSTATUS", "os.WIFSTOPPED", "os.WSTOPSIG",
            "os.waitstatus_to_exitcode", "os.register_at_fork", "os.get_exec_path", "os.sysconf", "os.urandom",
            "signal.valid_signals", "_signal.valid_signals", "signal.Signals", "signal.strsignal",
            "signal.default_int_handler", "_socket.CMSG_SPACE", "socket.CMSG_SPACE", "select.poll", "_thread.get_ident",
            "_thread.allocate_lock", "os.getenv", "os._exit", "os.umask", "signal.getsignal", "os.sched_getaffinity",
            "_thread.get_native_id", "os.get_inheritable", "signal.sigtimedwait", "resource.getrlimit",
            "posix.waitpid", "os.waitpid", "posix.waitid", "os.eventfd_write", "os.eventfd_read",
        ),
        "no system call, or none with an error for these arguments (ECHILD of waitpid(2) is an answer)",
    ),
    **dict.fromkeys(
        (
            "os.getpid", "os.getppid", "os.geteuid", "os.getegid", "os.getuid", "os.getgid", "os.uname", "os.getpgrp",
            "os.getpgid", "os.getsid", "os.times",
        ),
        "the manual page names no error for the calling process",
    ),
    **dict.fromkeys(
        ("os.close", "posix.close"), "close(2) of a kernel file, a pipe or a socket cannot fail: it has no flush"
    ),
    **dict.fromkeys(
        ("signal.signal", "signal.pthread_sigmask", "_signal.pthread_sigmask", "signal.set_wakeup_fd"),
        "sigaction(2) and sigprocmask(2) fail only for wrong arguments",
    ),
    **dict.fromkeys(
        ("signal.setitimer", "signal.getitimer"), "setitimer(2) and getitimer(2) fail only for wrong arguments"
    ),
}  # fmt: skip

#: System calls of `kernel.clone`, which a function of `kernel.syscalls` has prepared.
PREPARED = ("clone3", "self._keep_robust_list")

#: Calls that cannot fail where they are made.
CANNOT_FAIL_THERE = {
    "executors.thread:_Signal.give:os.write": "a byte in a pipe of this process, of which both ends are open",
    "executors.thread:_Signal.wait:os.read": "the same",
    "rcon_wsgi.exchange:Client.stop_waiting:socket.socket.shutdown": "shutdown(2) of a client's socket fails only where"
    " the client is gone, and then reading from it fails as well",
}


class Site(NamedTuple):
    """One call in the source. ``number`` counts calls of the same text in one function."""

    module: str
    function: str
    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.module}:{self.function}:{self.call}" + (f"#{self.number}" if self.number > 1 else "")


class _Finder(ast.NodeTransformer):
    """Collect the calls of a module and wrap each in a call of ``touch``."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self.sites: list[Site] = []
        self._module = module
        self._stack: list[str] = []
        self._count: Counter[tuple[str, str]] = Counter()
        self._has_own_open = any(
            isinstance(node, ast.FunctionDef) and node.name == "open" for node in tree.body
        )

    def _visit_named(self, node: ast.AST) -> ast.AST:
        self._stack.append(node.name)  # type: ignore[attr-defined]
        self.generic_visit(node)
        self._stack.pop()
        return node

    visit_FunctionDef = visit_ClassDef = visit_AsyncFunctionDef = _visit_named  # noqa: N815

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = self._name(node)
        if name is None:
            return node
        function = ".".join(self._stack)
        self._count[function, name] += 1
        site = Site(self._module, function, name, self._count[function, name])
        if str(site) in CANNOT_FAIL_THERE:
            return node
        self.sites.append(site)
        touch = ast.Name("__rcon_touch__", ast.Load())
        wrapped = ast.Call(touch, [ast.Constant(str(site)), node.func, *node.args], node.keywords)
        return ast.copy_location(wrapped, node)

    def _name(self, node: ast.Call) -> str | None:
        """Return the text of a call that reaches the kernel; None for others."""
        function = node.func
        if isinstance(function, ast.Name):
            if function.id == "open" and not self._has_own_open:
                return "open"
            if not self._is_c_library(function):
                return None
            return "mmap" if function.id == "call" else function.id
        if self._is_c_library(function):
            return ast.unparse(function)
        if not isinstance(function, ast.Attribute):
            return None
        text, owner, name = ast.unparse(function), ast.unparse(function.value), function.attr
        if owner in _MODULES and text not in CANNOT_FAIL and not (name[0].isupper() or name.isupper()):
            return text
        reaches = (
            (owner == "os.path" and name in _PATH_FUNCTIONS)
            or (owner in _SOCKETS and name in _SOCKET_METHODS)
            or (owner in _POLLS and name == "poll")
            or (name in _PATH_METHODS and owner.startswith("Path("))
            or text in _THREADS
        )
        return text if reaches else None

    def _is_c_library(self, function: ast.expr) -> bool:
        text = ast.unparse(function)
        if self._module == "kernel.clone":
            return text in PREPARED
        if self._module != "kernel.syscalls":
            return False
        return text.startswith("_libc().") or text in ("_syscall()", "self._call", "call")


def find(path: Path) -> tuple[ast.Module, list[Site]]:
    """Return the changed syntax tree of a file of the packages, and its calls."""
    tree = ast.parse(path.read_text(), str(path))
    top = next(folder for folder in (_CORE, _INTEGRATIONS) if path.is_relative_to(folder))
    name = ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
    finder = _Finder(name, tree)
    finder.visit(tree)
    if finder.sites:
        at = next(
            (
                index
                for index, node in enumerate(tree.body)
                if not isinstance(node, ast.Expr)
                and not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
            ),
            len(tree.body),
        )
        source = "from tests.faults.touch import touch as __rcon_touch__"
        tree.body.insert(at, ast.parse(source).body[0])
        ast.fix_missing_locations(tree)
    return tree, finder.sites


def sources() -> list[Path]:
    """Return the files of the packages."""
    tops = [*(_CORE / part for part in PARTS), *(_INTEGRATIONS / adapter for adapter in ADAPTERS)]
    return [
        path
        for top in tops
        for path in (sorted(top.rglob("*.py")) if top.is_dir() else [top.with_suffix(".py")])
    ]


def all_sites() -> list[Site]:
    """Return every call in the source."""
    return [site for path in sources() for site in find(path)[1]]


def compiled(path: Path) -> CodeType:
    """Return the code of a file, changed so that `touch` runs at each call.

    Keep it for the next worker. To change and compile all files takes seconds, in an emulated machine half a minute.
    """
    kept = _KEPT / f"{'.'.join(path.relative_to(ROOT).parts)}.{sys.implementation.cache_tag}"
    changed, here = path.stat(), Path(__file__).stat()
    key = (str(path), changed.st_mtime_ns, changed.st_size, here.st_mtime_ns, here.st_size)
    with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
        known, code = marshal.loads(kept.read_bytes())
        if known == key:
            return cast(CodeType, code)
    code = compile(find(path)[0], path, "exec", dont_inherit=True)
    with contextlib.suppress(OSError):  # in an emulated machine nothing can be written there
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_name(f"{kept.name}.{os.getpid()}")
        written.write_bytes(marshal.dumps((key, code)))
        written.rename(kept)
    return code


def compile_all() -> None:
    """Keep the code of each file, so that no worker has to compile it."""
    for path in sources():
        compiled(path)


def _is_ours(module: str) -> bool:
    """Return whether the calls of a module are found."""
    first, _, rest = module.partition(".")
    return first in ADAPTERS or (first == "rcon_plugins" and rest.partition(".")[0] in PARTS)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        return compiled(Path(self.get_filename(fullname)))


class _Importer:
    """Loads the modules of the packages changed. Put it first in `sys.meta_path`, before they are imported."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_ours(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def install() -> None:
    """Have the modules of the packages loaded so that `touch` runs at each call. Nothing may be imported yet."""
    early = [name for name in sys.modules if _is_ours(name)]
    if early:
        raise RuntimeError(f"imported too early: {early}")
    sys.meta_path.insert(0, _Importer())
