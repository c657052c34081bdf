"""The sdist, the wheel and an editable install: what is in them, and that what they install imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
PACKAGES = ("rcon_plugins", "rcon_wsgi", "rcon_gunicorn", "rcon_celery")

pytestmark = pytest.mark.timeout(300)


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))[:200]}:\n{done.stdout}"
    return done.stdout


def tracked() -> list[str]:
    """The files of the project, as a checkout or an sdist holds them."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        # safe.directory: a checkout of one user is tested by root.
        listing = ("-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard")
        return [name for name in run("git", *listing, cwd=ROOT).splitlines() if (ROOT / name).exists()]
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [
        str(file) for file in files if not file.parts[0].startswith(".") and "__pycache__" not in file.parts
    ]


def importable() -> list[str]:
    """Every module that a wheel should hold, but for those that gunicorn itself loads into a running server."""
    modules = []
    for home, package in (
        (ROOT if name == "rcon_plugins" else ROOT / "integrations", name) for name in PACKAGES
    ):
        for path in sorted((home / package).rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in modules if name != "rcon_gunicorn.conf"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it.

    Built with the hatchling of the tests. The editable install is built in isolation, as pyproject.toml requires it.
    """
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """The interpreter of a new venv, with nothing in it: the pip of the tests installs into it.

    Its path has a space, and is longer than the kernel reads of a line with ``#!``.
    """
    folder = tmp_path / "a venv" / ("x" * 200) / ("y" * 60)
    venv.create(folder)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str | Path, cwd: Path) -> str:
    """Run pip for the environment of another interpreter."""
    return run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *arguments, cwd=cwd
    )


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    """Install. Byte code is made when a module is imported: most of the modules are not."""
    pip(python, "install", "--quiet", "--no-compile", *what, cwd=cwd)


def test_the_files_of_the_wheel(built: Path) -> None:
    info = f"rcon_plugins-{VERSION}.dist-info"
    with zipfile.ZipFile(built / f"rcon_plugins-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    data = f"rcon_plugins-{VERSION}.data"
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, info, data}
    assert {name for name in names if name.startswith(data)} == {
        f"{data}/scripts/capcon",
        f"{data}/scripts/rcon",
    }
    expected = {
        name.removeprefix("integrations/") for name in tracked() if name.endswith((".py", "py.typed"))
    }
    expected = {name for name in expected if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    assert {name for name in names if not name.startswith((info, data))} == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {f"{info}/METADATA", f"{info}/RECORD", f"{info}/WHEEL", f"{info}/licenses/LICENSE"} <= names


def test_the_files_of_the_sdist(built: Path) -> None:
    with tarfile.open(built / f"rcon_plugins-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    left_out = {name for name in tracked() if name not in names}
    assert {name for name in left_out if not name.startswith((".ci/", ".git"))} == set()
    assert not any("__pycache__" in name or name.startswith(".venv") for name in names)


def test_an_installed_wheel_imports(built: Path, clean: Path, tmp_path: Path) -> None:
    wheel = built / f"rcon_plugins-{VERSION}-py3-none-any.whl"
    install(clean, f"{wheel}[gunicorn,celery]", cwd=tmp_path)
    check_imports(clean, tmp_path)
    check_commands(clean, tmp_path)


def test_an_editable_install_imports(clean: Path, tmp_path: Path) -> None:
    """Each module is found. The installed wheel has the same ones, and imports each alone."""
    install(clean, "--editable", f"{ROOT}[gunicorn,celery]", cwd=tmp_path)
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    run(clean, "-W", "error", "-c", script, *importable(), cwd=tmp_path)
    check_commands(clean, tmp_path)


def check_imports(python: Path, cwd: Path) -> None:
    """Each of our modules alone and first, in an interpreter that turns warnings into errors.

    What they import of others is imported once, before the forks.
    """
    script = """
import importlib, os, sys
packages, modules = sys.argv[1].split(","), sys.argv[2:]

def in_fork(program):
    pid = os.fork()
    if pid == 0:
        try:
            program()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit(1)

def import_all():
    for name in modules:
        importlib.import_module(name)
    others = (name for name in sys.modules if name.partition(".")[0] not in packages)
    with os.fdopen(write, "w") as file:
        file.write(" ".join(others))

read, write = os.pipe()
in_fork(import_all)
os.close(write)
for name in open(read).read().split():
    try:
        importlib.import_module(name)
    except ImportError:  # a name that its package made up
        pass
for name in modules:
    assert not set(packages) & set(sys.modules)
    in_fork(lambda: importlib.import_module(name))
"""
    run(python, "-W", "error", "-c", script, ",".join(PACKAGES), *importable(), cwd=cwd)


def check_commands(python: Path, cwd: Path) -> None:
    """Both commands start by their path, through links, and from PATH, whatever variables Python would read."""
    hidden = cwd / "hidden"
    hidden.mkdir()
    for name in ("platform", "sitecustomize", "rcon_plugins", "click"):
        (hidden / f"{name}.py").write_text("raise ImportError('of the command')")
    link, relative = cwd / "linked", cwd / "relative"
    link.mkdir()
    relative.mkdir()
    environments: list[dict[str, str]] = [{}, {"PYTHONPATH": str(hidden), "PYTHONHOME": str(hidden)}]
    for command in ("capcon", "rcon"):
        script = python.parent / command
        (link / command).symlink_to(script)
        (relative / command).symlink_to(os.path.relpath(link / command, relative))
        for env in environments:
            for path in (script, link / command, relative / command, os.path.relpath(script, cwd)):
                shown = printed(str(path), "--version", cwd=cwd, env=env)
                assert shown == f"{command} {VERSION}\n"
        # As with sudo, whose secure_path has a link to the script.
        assert printed("/usr/bin/env", command, "--version", cwd=cwd, env={"PATH": f"{link}:/usr/bin:/bin"})
        assert printed("/bin/sh", command, "--version", cwd=script.parent, env={})


def printed(*command: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_core_needs_no_server(built: Path, clean: Path, tmp_path: Path) -> None:
    """Without extras: the core and the middleware import, and nothing of gunicorn is installed."""
    install(clean, built / f"rcon_plugins-{VERSION}-py3-none-any.whl", cwd=tmp_path)
    listed = pip(clean, "list", "--format", "freeze", cwd=tmp_path)
    installed = {line.partition("==")[0].lower() for line in listed.split()}
    of_rich = {"rich", "markdown-it-py", "mdurl", "pygments"}
    assert installed == {"rcon-plugins", "pluggy", "msgspec", "click"} | of_rich
    run(clean, "-W", "error", "-c", "import rcon_plugins, rcon_wsgi", cwd=tmp_path)
    for command in ("capcon", "rcon"):
        assert f"Usage: {command} " in run(clean.parent / command, "--help", cwd=tmp_path)
