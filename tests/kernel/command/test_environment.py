"""The environment of a command: it reaches the command unchanged, and it does not reach rcon and capcon.

The scripts run as processes, as users start them: ``rcon`` and ``capcon`` beside the interpreter of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
RUN, RUN_AS = (str(BIN / "rcon"), "run", "--"), (str(BIN / "rcon"), "run", "--user", "nobody", "--")
CAPCON = (str(BIN / "capcon"), "run", "--drop-all", "--")
PLAIN = {b"PATH": b"/usr/bin:/bin", b"LANG": b"C.UTF-8"}

#: Print the top-level modules that the sources of the commands import, wherever they do, and what those import.
_IMPORTED = """
import ast, contextlib, importlib, pathlib, pkgutil, sys
import rcon_plugins
for module in pkgutil.walk_packages(rcon_plugins.__path__, "rcon_plugins."):
    importlib.import_module(module.name)
    for node in ast.walk(ast.parse(pathlib.Path(sys.modules[module.name].__file__).read_text())):
        for name in [one.name for one in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) else []
        ):
            importlib.import_module(name)
print(*{name.partition(".")[0] for name in sys.modules})
"""
#: Print those that a command imports whose words are the arguments.
_STARTED = """
import os, sys
os._exit = lambda status: sys.exit(print(*{name.partition(".")[0] for name in sys.modules}))
from rcon_plugins.cli.start import main
main()
"""


def names_of(code: str, *words: str) -> list[str]:
    """Return the modules that the code prints and that a file could hide, with those that Python imports at start."""
    printed = subprocess.run([sys.executable, "-I", "-c", code, *words], capture_output=True, check=True)
    names = {*printed.stdout.decode().split(), "encodings", "site", "sitecustomize", "usercustomize"}
    return sorted(name for name in names - {"__main__"} if name.isidentifier())


def hide(folder: Path, names: list[str]) -> None:
    """Write a module of each name that cannot be imported."""
    for name in names:
        (folder / f"{name}.py").write_text(f'raise ImportError("the {name} of the command")\n')


def run(
    *words: str, env: dict[bytes, bytes] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        words, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60
    )


def test_no_module_of_the_command_is_imported(tmp_path: Path) -> None:
    names = names_of(_IMPORTED)
    assert {"platform", "logging", "token", "click", "msgspec", "pluggy", "rich", "os"} <= {*names}
    hide(tmp_path, names)
    tmp_path.chmod(0o755)
    folder = os.fsencode(tmp_path)
    # In the working directory as well, which Python searches for some ways to start it.
    hostile = {**PLAIN, b"PYTHONPATH": folder, b"PYTHONHOME": folder, b"PYTHONSTARTUP": folder + b"/os.py"}
    hostile |= {b"PYTHONWARNINGS": b"error::hidden.Warning", b"PYTHONUSERBASE": folder, b"HOME": folder}
    words: tuple[str, ...]
    for words in (RUN, RUN_AS, CAPCON):
        done = run(*words, "/usr/bin/env", env=hostile, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b""), words
        variables = done.stdout.splitlines()
        assert {b"PYTHONPATH=" + folder, b"PYTHONHOME=" + folder} <= {*variables}, words
    rcon, capcon = str(BIN / "rcon"), str(BIN / "capcon")
    others: tuple[tuple[str, ...], ...] = (
        (rcon, "doctor"),
        (rcon, "ls", "--json"),
        (rcon, "--help"),
        (capcon, "show"),
        (rcon, "schema"),
    )
    for words in others:
        done = run(*words, env=hostile, cwd=tmp_path)
        assert done.returncode in ((0, 1) if "doctor" in words else (0,)), done.stderr
        assert (bool(done.stdout), done.stderr) == (True, b""), words


def test_each_module_alone(tmp_path: Path) -> None:
    for name in names_of(_STARTED, "run", "--memory", "1G", "--", "true"):
        folder = tmp_path / name
        folder.mkdir()
        hide(folder, [name])
        done = run(*RUN, "/bin/true", env={**PLAIN, b"PYTHONPATH": os.fsencode(folder)})
        assert (name, done.returncode, done.stderr) == (name, 0, b"")


ENVIRONMENTS: dict[str, dict[bytes, bytes]] = {
    "none": {},
    "PWD right": {b"PWD": b"/usr/lib"},
    "PWD wrong": {b"PWD": b"/usr"},
    "PWD relative": {b"PWD": b"lib"},
    "no identifiers": {b"BASH_FUNC_x%%": b"() { :; }", b"a.b": b"1", b"1": b"2", b"A B": b"3", b"\xff": b"4"},
    "values": {b"A": b"\xff\xfe\n\nB=1\n", b"EMPTY": b"", b"EQUALS": b"=a=b="},
    "of a shell": {
        b"OLDPWD": b"/etc",
        b"SHLVL": b"3",
        b"_": b"/usr/bin/true",
        b"IFS": b"x",
        b"OPTIND": b"4",
        b"ENV": b"/nowhere",
        b"BASH_ENV": b"/nowhere",
        b"CDPATH": b"/",
    },
    "of the script": {b"RCON_ENVIRONMENT": b"mine", b"copy": b"1", b"script": b"2", b"python": b"3"},
    "C locale": {b"LANG": b"C"},
    "LC_CTYPE": {b"LANG": b"C", b"LC_CTYPE": b"C"},
    "no PATH to sh": {b"PATH": b"/nowhere"},
    "long": {b"TEXT%d" % number: b"text %d" % number * 10_000 for number in range(8)},
}


@pytest.mark.parametrize("words", [RUN, CAPCON], ids=["rcon run", "capcon run"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_environment_reaches_the_command_unchanged(name: str, words: tuple[str, ...]) -> None:
    env = {**PLAIN, **ENVIRONMENTS[name]}
    plain = run("/usr/bin/env", "-0", env=env, cwd=Path("/usr/lib"))
    done = run(*words, "/usr/bin/env", "-0", env=env, cwd=Path("/usr/lib"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.split(b"\0") == plain.stdout.split(b"\0")


@pytest.mark.smoke
def test_no_environment_at_all() -> None:
    for words in (RUN, CAPCON):
        done = run(*words, "/usr/bin/env", env={})
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_script_starts_where_it_can_fork_no_more() -> None:
    """The script cannot copy its environment then, and no message of sh takes the place of capcon's."""
    done = run(str(BIN / "rcon"), "run", "--pids", "1", "--", *CAPCON, "/bin/echo", "fine", env=PLAIN)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"fine\n", b"")


def test_signals_that_the_caller_ignores_or_blocks_stay_so() -> None:
    """sh lies between the caller and rcon."""
    code = (
        "import os, signal, sys\n"
        "for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    shown = ["/bin/grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]
    plain = run(sys.executable, "-c", code, *shown, env=PLAIN)
    assert b"Sig" in plain.stdout
    for words in (RUN, CAPCON):
        done = run(sys.executable, "-c", code, *words, *shown, env=PLAIN)
        # SIGPIPE and SIGXFSZ: the interpreter of this test ignores them, and rcon restores them.
        own = (1 << 12) | (1 << 24)
        assert masks(done.stdout) == {name: mask & ~own for name, mask in masks(plain.stdout).items()}, words


def masks(text: bytes) -> dict[bytes, int]:
    """Return the masks of signals in lines of /proc/PID/status."""
    return {name: int(mask, 16) for name, mask in re.findall(rb"(Sig\w+):\t(\w+)", text)}


@pytest.mark.parametrize("name", ["rcon", "capcon"])
def test_a_script_that_cannot_start_says_why(name: str, tmp_path: Path) -> None:
    script = tmp_path / name
    text = (SCRIPTS / name).read_text()
    script.write_text(text.replace("/usr/bin/python3", "/nowhere/python3"))
    script.chmod(0o755)
    done = run(str(script), "run", "true", env=PLAIN)
    message = f"{name}: there is no Python interpreter beside {script} (install rcon-plugins again)\n"
    assert (done.returncode, done.stderr.decode()) == (125, message)
    (tmp_path / "python3").symlink_to(Path(sys.executable).resolve())
    done = run(str(script), "run", "true", env=PLAIN)
    assert done.returncode == 125
    assert done.stderr.decode() == (
        f"{name}: {tmp_path}/python3: No module named 'rcon_plugins' (install rcon-plugins again)\n"
    )


def test_both_scripts_are_the_same() -> None:
    rcon, capcon = ((SCRIPTS / name).read_text() for name in ("rcon", "capcon"))
    assert re.sub(r"\brcon\b(?!-)", "capcon", rcon).replace("main", "capcon_main") == capcon
