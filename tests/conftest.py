"""Rules for every test run. Tests are in tiers, one directory each: unit, contract, integrations, kernel.

- Tests of the kernel tier need root and a cgroup hierarchy; they are marked `kernel` here.
- `each_layout` marks a test that depends on the cgroup hierarchy: tests/vm.py runs it again on pure cgroup v2. `smoke`
  marks one quick test of each file of the kernel tier: `make check` runs it, and tests/vm.py does, as that machine has
  another kernel, too.
- `once` marks a test of a module that is `each_layout` whose code is the same under any hierarchy.
- `layout("v2")`, or "v1", "hybrid", marks a test for some hierarchies; on others it is deselected. Such a test is
  `each_layout`, too. `init("systemd")` marks a test for the machine that systemd has booted (tests/vm_systemd.py).
- `measures` marks a test that measures CPU time or the rate of IO. It runs alone: tests/run.py starts it after
  everything else, and under pytest-xdist (`-n`) it fails. All other tests may run under `-n 2`.
- In CI (`CI` in the environment) a skip is a failure, and so is an empty tier.
- `--reruns 1` runs a test that failed a second time. Each is named at the end with how it failed, and more than FEW of
  them fail the run.
- After the run no process and no cgroup of the tests may be left (tests/leftovers.py); if one is, the run fails.
- Irreversible acts are done in child processes: the fixture `in_child`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import children, leftovers

TESTS = Path(__file__).parent
TIERS = ("unit", "contract", "integrations", "kernel")
GRACE = 5.0  # seconds in which processes that were told to end may end
FEW = 4  # the number of tests of a run that may need a second attempt


class Beginning(NamedTuple):
    supervisor: int
    cgroups: set[Path]


beginning = pytest.StashKey[Beginning]()
left = pytest.StashKey[list[str]]()
patience = pytest.StashKey[Any]()
own_files = pytest.StashKey[str]()
failed = pytest.StashKey[bool]()


@pytest.fixture
def in_child() -> Any:
    """`in_child(function, *arguments, timeout=30)` calls it in a forked child; see tests/children.py."""
    return children.in_child


@pytest.fixture
def machine_budget() -> Iterator[None]:
    """The memory budget of this machine for one test at a time. All servers of one user share its ledger.

    Tests of other processes, and of other runs, wait for it here.
    """
    with Path(tempfile.gettempdir(), f"rcon-tests-budget-{os.geteuid()}").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give this run a directory of its own for `tmp_path`.

    By default all runs of a user share /tmp/pytest-of-USER, and each one that starts takes the permissions of others
    there away. Tests of another run, whose servers read files in it as another user (`let_others_read`), then fail.
    """
    if config.option.basetemp is None and not config.option.collectonly and not is_worker(config):
        config.option.basetemp = config.stash[own_files] = tempfile.mkdtemp(prefix="rcon-tests-")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Supervise the run. The run that started a worker of pytest-xdist supervises the worker, too."""
    config = session.config
    if is_worker(config):
        # Tests stop processes. If a process ends meanwhile whose child belongs to this process group, the kernel may
        # send SIGHUP to all of the group, which is orphaned (setpgid(2)): to the other workers, and to the run.
        os.setsid()
    if config.option.collectonly or is_worker(config):
        return
    # A shell starts background commands with these signals ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        supervisor = leftovers.supervise()  # it writes messages to the real stderr
    config.stash[beginning] = Beginning(supervisor, leftovers.cgroups())


def is_worker(config: pytest.Config) -> bool:
    """Return whether this is a worker process of pytest-xdist. It has threads already, so it cannot fork and go on."""
    return hasattr(config, "workerinput")


def tier(item: pytest.Item) -> str:
    path = item.path
    return path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else ""


def layout() -> str:
    """Return v2, v1 or hybrid, by the mounts (independent of the code under test)."""
    mounted = {line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}
    return "hybrid" if {"cgroup", "cgroup2"} <= mounted else "v2" if "cgroup2" in mounted else "v1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if tier(item) == "kernel":
            item.add_marker("kernel")
        elif item.get_closest_marker("kernel"):
            raise pytest.UsageError(f"{item.nodeid} is marked kernel, but is not in tests/kernel")
        if item.get_closest_marker("layout"):
            item.add_marker("each_layout")
    here = {"layout": layout(), "init": os.environ.get("RCON_TEST_INIT", "")}
    elsewhere = [
        item
        for item in items
        if any((m := item.get_closest_marker(name)) and value not in m.args for name, value in here.items())
    ]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Check the tests that -k and -m have selected."""
    present = {tier(item) for item in session.items}
    if "kernel" in present and os.geteuid() != 0:
        raise pytest.UsageError(
            "tests/kernel needs root: sudo make test; without root: make test-unit test-contract"
        )
    everything = any(Path(argument).resolve() == TESTS for argument in session.config.args)
    missing = [name for name in TIERS if name not in present]
    if "CI" in os.environ and everything and missing:
        raise pytest.UsageError(f"in CI every tier is run, and no test was found in: {', '.join(missing)}")
    # For its summary the plugin would import all of hypothesis, even if no test uses it.
    if "hypothesis" not in sys.modules and session.config.pluginmanager.has_plugin("hypothesispytest"):
        session.config.pluginmanager.unregister(name="hypothesispytest")
    # Each server that a test makes here collects garbage before it forks, and a collection writes to all objects, which
    # copies their pages in forked children. The collector need not look at what pytest and the modules keep for ever.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """Note the timeout. pytest-timeout sets it afterwards."""
    item.stash[patience] = settings


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give a second attempt a timeout of its own. pytest-timeout sets one for both attempts, which has run out then."""
    if is_worker(item.config) and item.get_closest_marker("measures"):
        pytest.fail(
            "it measures CPU time or IO, so it runs alone; with -n, add: -m 'not measures'", pytrace=False
        )
    if getattr(item, "execution_count", 1) > 1 and patience in item.stash:
        item.config.hook.pytest_timeout_cancel_timer(item=item)
        item.config.hook.pytest_timeout_set_timer(item=item, settings=item.stash[patience])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and "CI" in os.environ and not hasattr(report, "wasxfail"):
        fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and "CI" in os.environ:
        fail(report)
    return report


def fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    report.outcome = "failed"
    report.longrepr = f"in CI a skip is a failure: {report.longreprtext}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if anything is left. Give ending processes some time. Workers of pytest-xdist have ended already."""
    start = session.config.stash.get(beginning, None)
    if start is None:
        return
    deadline = time.monotonic() + GRACE
    while (found := look(start)) and time.monotonic() < deadline:
        time.sleep(0.05)
    session.config.stash[left] = found
    if found:
        fail_the_run(session, "leftovers", "left behind by the tests: " + "; ".join(found))
    again = run_again(session.config)
    if len(again) > FEW:
        fail_the_run(session, "reruns", f"{len(again)} tests had to be run again, of which {FEW} may")
    session.config.stash[failed] = session.exitstatus != pytest.ExitCode.OK


def fail_the_run(session: pytest.Session, name: str, text: str) -> None:
    report = pytest.TestReport(name, ("tests/conftest.py", None, name), {}, "failed", text, "teardown")
    terminal = session.config.pluginmanager.getplugin("terminalreporter")
    terminal.stats.setdefault("error", []).append(report)  # otherwise the last line would report success
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def run_again(config: pytest.Config) -> list[pytest.TestReport]:
    """Return the reports of the first attempts of tests that were run a second time."""
    terminal = config.pluginmanager.getplugin("terminalreporter")
    return list(terminal.stats.get("rerun", ()))


def look(start: Beginning) -> list[str]:
    processes = leftovers.descendants(start.supervisor)
    processes.pop(os.getpid(), None)
    ours = {start.supervisor, os.getpid(), *processes}
    return [
        *(f"process {text}" for text in processes.values()),
        *(f"cgroup {path}" for path in leftovers.cgroups_left(start.cgroups, ours)),
    ]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the files of the tests, unless one failed."""
    if (directory := config.stash.get(own_files, None)) and not config.stash.get(failed, True):
        shutil.rmtree(directory, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if again := run_again(config):
        terminalreporter.section("run again, as they failed")
        for report in again:
            terminalreporter.line(report.nodeid)
            terminalreporter.line(report.longreprtext)
            for title, text in report.sections:
                terminalreporter.line(f"{title}:\n{text}")
    if config.stash.get(failed, False) and own_files in config.stash:
        terminalreporter.line(f"the files of the tests are in {config.stash[own_files]}")
    if config.stash.get(left, None) == []:
        terminalreporter.line("no process and no cgroup of the tests is left")
