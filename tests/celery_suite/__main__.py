"""Run Celery's own integration suite twice, plain and with every task confined, and compare each case.

`python -m tests.celery_suite [pytest arguments]` downloads the sdist of the installed Celery, makes a venv for what
that suite needs, and runs `t/integration` with a Redis as it is; then again with the plugin `confine`, which
installs rcon_celery in the application under test. All of it is in `build/celery`. It fails where a case ends
otherwise confined than plain. A case that fails both ways fails for Celery alone, or needs a service that is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import celery

from tests.integrations.celery.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "celery"
PYTHON = BUILD / "venv" / "bin" / "python"
VERSION = celery.__version__
PACKAGES = (
    *(f"celery[redis,pydantic,sqlalchemy,auth]=={VERSION}", "django", "python-dateutil"),
    *("pytest>=9", "pytest-timeout", "pytest-rerunfailures", "pytest-order"),
)
SECONDS = 3600  # for one of the two runs


def source() -> Path:
    """The unpacked sdist, downloaded the first time."""
    folder = BUILD / f"celery-{VERSION}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(BUILD), f"celery=={VERSION}"], check=True)
        with tarfile.open(BUILD / f"celery-{VERSION}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    return folder


def prepare() -> None:
    """A venv with this project and what Celery's suite imports."""
    stamp = BUILD / "venv" / f".celery-{VERSION}"
    if stamp.exists():
        return
    venv.create(BUILD / "venv", clear=True, with_pip=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--editable", ROOT, *PACKAGES], check=True)
    stamp.touch()


def run(name: str, folder: Path, arguments: list[str]) -> dict[str, str]:
    """Run the suite once, on a Redis of its own. Return how each case ended, by its name."""
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as server:
        return run_on(server.port, name, folder, arguments)


def run_on(port: int, name: str, folder: Path, arguments: list[str]) -> dict[str, str]:
    report = BUILD / f"{name}.xml"
    report.unlink(missing_ok=True)
    url = f"redis://127.0.0.1:{port}/0"  # some cases read database 0, whatever the setting
    tests = folder / "t" / "integration"
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        str(tests),
        "--rootdir",
        str(folder),
        f"--junitxml={report}",
        "-q",
    ]
    command += ["--ignore", str(tests / "test_backend.py")]  # Azure's blob storage
    command += ["-p", "celery.contrib.pytest"]  # has the marker `celery`
    command += ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", *arguments]
    if name == "confined":
        command += ["-p", "tests.celery_suite.confine"]
    environment = {
        **os.environ,
        "TEST_BROKER": url,
        "TEST_BACKEND": url,
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(port),
        "PYTHONPATH": f"{folder}:{ROOT}",
        "C_FORCE_ROOT": "1",
    }
    print(f"== {name}: {' '.join(command)}", flush=True)
    subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False
    )
    return {
        f"{case.get('classname')}::{case.get('name')}": outcome(case)
        for case in ElementTree.parse(report).iter("testcase")
    }


def outcome(case: ElementTree.Element) -> str:
    found = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
    return found[0] if found else "passed"


def main() -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    folder = source()
    prepare()
    plain = run("plain", folder, sys.argv[1:])
    confined = run("confined", folder, sys.argv[1:])
    for name, outcomes in (("plain", plain), ("confined", confined)):
        counts = ", ".join(f"{number} {word}" for word, number in sorted(Counter(outcomes.values()).items()))
        print(f"{name}: {len(outcomes)} cases: {counts}")
    different = [name for name in sorted({*plain, *confined}) if plain.get(name) != confined.get(name)]
    for name in different:
        print(f"{name}: plain {plain.get(name, 'missing')}, confined {confined.get(name, 'missing')}")
    if "passed" not in plain.values():
        print("no case passed plain: is everything there that it needs?")
        return 1
    print(f"{len(different)} cases end otherwise confined")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
