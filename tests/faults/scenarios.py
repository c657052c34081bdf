"""What is done while a call fails: a server starts, serves, ends executors and closes; commands run. In phases.

Each answer is what the work says of itself, from the kernel's files and by trying: `report`. It is compared with the
answer of a run in which nothing fails.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import mmap
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from celery.exceptions import Ignore, Reject, Retry

from rcon_plugins import Manager, Outcome, RunningManager, Server, Work
from rcon_plugins.confinement.admission import LocalAdmission, ProcessAdmission
from rcon_plugins.errors import ConfinementError, Killed, RconError, TimeLimitExceeded
from rcon_plugins.executors.channel import FIRST_SERVICE_KIND, Channel, ChannelClosed, Frame
from rcon_plugins.executors.inside import Service
from rcon_plugins.settings.file import from_mapping
from rcon_wsgi import ConfineMiddleware, WsgiService
from rcon_wsgi.exchange import ResponseCut
from tests.commands import FAILED, become_rcon
from tests.faults import celery_pool
from tests.faults.cases import SCENARIOS
from tests.faults.report import open_kinds, report, report_of_process
from tests.faults.touch import Setup, ask

TENANT = 61001
ANSWER = FIRST_SERVICE_KIND + 1
#: A Python that every user may execute.
PYTHON = "/usr/bin/python3"
#: A program for ``rcon run`` that prints what it says of itself.
PROGRAM = f"{Path(__file__).with_name('report.py').read_text()}\nimport json\nprint(json.dumps(report_of_process()))"
#: What says that work did not run, or ended early. A task is also sent back to its queue.
REFUSED = (RconError, ChannelClosed, ResponseCut, Reject, Ignore, Retry)
#: How long a request may take while calls fail, seconds: the bounds of the code, READY_SECONDS and what follows.
SLOW = 20.0
#: How long a server may need until it serves again, once calls fail no longer, seconds.
RECOVERY = 15.0
#: How long threads of the server may need to close their descriptors after the server has closed, seconds.
LEFT_SECONDS = 4.5
#: What the process keeps for the next server.
_KEPT = {"/memfd:rcon-changes (deleted)", "/run/rcon-faults-#/budget"}


def serve(channel: Channel, frame: Frame) -> None:
    """Do what a request says, in an executor process."""
    act = frame.payload.decode()
    if act == "report":
        os.write(2, b"said by an executor\n")
        channel.send((ANSWER, json.dumps(report_of_process()).encode()))
    elif act == "leave":  # leave a child of a child behind, in a session of its own
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(300)
            os._exit(0)
        os.wait()
        channel.send((ANSWER, b"{}"))
    elif act == "die":
        os._exit(3)
    else:
        time.sleep(300)


class Case:
    """One run of a scenario. ``found`` has what is wrong; the worker adds what is left afterwards."""

    def __init__(self, base: str, armed: str = "") -> None:
        self.base = base
        self.armed = armed
        self.answers: dict[str, Any] = {}
        self.refusals: list[str] = []
        self.faults: list[str] = []
        #: The cgroups of the serving thread between requests.
        self.home: str | None = None
        self.served_after = False
        self.said = False

    def phase(self, name: str) -> None:
        """Begin a phase."""
        ask(f"phase\t{name}")

    def chosen(self, phases: Sequence[str], leads: Mapping[str, str] | None = None) -> list[str]:
        """Return which of these phases to run: all, or those that one failing call needs.

        That is the first one, which makes what the others find; the phase of the failing call; and the next one, which
        meets what the failing call left. ``leads`` names phases that come before all these, and the one they are for.
        """
        if not self.armed:
            return list(phases)
        armed = (leads or {}).get(self.armed, self.armed)
        position = phases.index(armed) if armed in phases else 0
        return [name for index, name in enumerate(phases) if index in (0, position, position + 1)]

    def over(self) -> bool:
        """Return whether calls fail no longer."""
        return not ask("failing")

    @contextlib.contextmanager
    def refusing(self, what: str) -> Iterator[None]:
        """Note a refusal. Any other error is a fault, and so is one that comes late."""
        began = time.monotonic()
        try:
            yield
        except REFUSED as error:
            self.refusals.append(f"{what}: {type(error).__name__}: {error}"[:300])
        except Exception as error:
            self.faults.append(f"{what}: not an RconError: {error!r}"[:300])
        if time.monotonic() - began > SLOW:
            self.faults.append(f"{what}: took {time.monotonic() - began:.0f} s")

    def managed(
        self,
        settings: dict[str, Any],
        steps: Callable[[RunningManager], None],
        *,
        service: Service | None = None,
        again: Callable[[RunningManager], object] | None = None,
        **options: Any,
    ) -> None:
        """Start a server, take the steps, close it. ``again`` makes a request after the failure."""
        before, lost = open_kinds(), threading.Event()
        self.phase("start")
        manager = None
        with self.refusing("start"):
            judged = Manager(from_mapping({**settings, "cgroup": self.base}), **options)
            manager = judged.start(service or serve, on_lost=lost.set)
        if manager is None:
            self.said = True
            gc.collect()
            self.count_descriptors(before)
            return
        steps(manager)
        if not lost.is_set() and not manager.is_lost:
            running, ask_again = manager, again or (lambda one: self.request(one, "again", "report", "p"))
            self.recover(lambda: ask_again(running), lambda: running.is_lost)
            del running
        self.phase("close")
        before_close = len(self.refusals)
        with self.refusing("close"):
            manager.close()
        self.said = len(self.refusals) > before_close
        threads = [one.name for one in threading.enumerate() if one.name.startswith("rcon-su")]
        if threads:
            self.faults.append(f"threads left: {threads}")
        del manager
        gc.collect()
        self.count_descriptors(before)

    def command(self, phase: str, folder: str, *words: str, expected: str = "") -> None:
        """Run ``rcon run`` in a fork, and keep what the command says of itself, if it says anything.

        ``expected`` is what rcon itself says when nothing fails.
        """
        self.phase(phase)
        out, err = Path(folder, f"{phase}.out"), Path(folder, f"{phase}.err")
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            become_rcon(["run", "--cgroup", self.base, *words], [out, err], before=_host_is_here)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if time.monotonic() - began > SLOW:
            self.faults.append(f"{phase}: took {time.monotonic() - began:.0f} s")
        said, answer = err.read_text(), out.read_text()
        self.said = self.said or said != expected
        if answer:
            self.answers[phase] = json.loads(answer)
        if "Traceback" in said or status == FAILED:
            self.faults.append(f"{phase}: {said[-500:]}")
        elif said != expected:
            self.refusals.append(f"{phase}: exit status {status}: {said}"[:300])
        else:
            self.answers[f"{phase}: status"] = {"status": status}

    def count_descriptors(self, before: dict[str, int]) -> None:
        """Keep as an answer which descriptors are open beside those of before. Threads may still close some."""
        deadline = time.monotonic() + LEFT_SECONDS
        while True:
            more = {kind: count - before.get(kind, 0) for kind, count in open_kinds().items()}
            found = {kind: count for kind, count in more.items() if count > 0}
            if time.monotonic() > deadline or not (found.keys() - _KEPT):
                break
            time.sleep(0.05)
        self.answers["descriptors"] = found

    def recover(self, request: Callable[[], object], is_lost: Callable[[], bool]) -> None:
        """Wait until a request is served again."""
        self.phase("recovery")
        while not self.over():
            time.sleep(0.05)
        deadline = time.monotonic() + RECOVERY
        error = ""
        while time.monotonic() < deadline and not is_lost():
            try:
                request()
                return
            except REFUSED as why:
                error = str(why)
            time.sleep(0.1)
        if not is_lost():  # otherwise a server of several processes replaces this one
            self.faults.append(f"does not serve again: {error}")

    def request(self, manager: RunningManager, name: str, act: str, policy: str) -> Outcome:
        """Have a request served, and keep its answer."""
        admission = manager.admit(Work("call", policy, {"path": f"/{policy}", "host": "anna.example"}))
        assert admission is not None
        if isinstance(admission, LocalAdmission):
            return self._local(admission, name)
        assert isinstance(admission, ProcessAdmission)
        try:
            admission.channel.send((ANSWER, act.encode()))
            frame = admission.channel.receive()
        except ChannelClosed:
            outcome = admission.died()
            if act == "report":
                raise
            return outcome
        if act == "report":
            self.answers[name] = json.loads(frame.payload)
        return admission.finish()

    def _local(self, admission: LocalAdmission, name: str) -> Outcome:
        if self.home is None:  # on v2 the server itself is in a cgroup of its instance
            self.home = Path("/proc/thread-self/cgroup").read_text()
        try:
            self.answers[name] = admission.call(report)
        except BaseException:
            admission.finish("error")
            raise
        outcome = admission.finish()
        if Path("/proc/thread-self/cgroup").read_text() != self.home:
            self.faults.append(f"{name}: the serving thread stays in the cgroup")
        return outcome


def quiet(manager: RunningManager) -> None:
    """Wait until no executor is ending, or for a while."""
    processes = manager._pool.processes
    deadline = time.monotonic() + 12
    while processes._ending and time.monotonic() < deadline:
        time.sleep(0.01)


@contextlib.contextmanager
def files_of_the_application() -> Iterator[None]:
    """Open a log, a file to write, a file to read, and a file mapped into memory, as an application may."""
    with tempfile.TemporaryDirectory(prefix="rcon-faults-") as folder, contextlib.ExitStack() as opened:
        for name, flags in (("log", os.O_WRONLY | os.O_APPEND), ("data", os.O_RDWR), ("read", os.O_RDONLY)):
            path = Path(folder, name)
            path.write_bytes(bytes(4096))
            path.chmod(0o644)
            opened.callback(os.close, descriptor := os.open(path, flags))
            if name == "data":
                opened.enter_context(mmap.mmap(descriptor, 4096))
        yield


def _processes(case: Case, policies: dict[str, Any], settings: dict[str, Any] | None = None) -> None:
    def steps(manager: RunningManager) -> None:
        requests = {
            "spawn": ("report", "p"),
            "again": ("report", "p"),
            "leave": ("leave", "p"),
            "die": ("die", "p"),
            "timeout": ("sleep", "quick"),
        }
        for phase in case.chosen([*requests]):
            case.phase(phase)
            with case.refusing(phase):
                case.request(manager, phase, *requests[phase])
            quiet(manager)

    case.managed({**_routed(policies), **(settings or {})}, steps)


def _routed(policies: dict[str, Any]) -> dict[str, Any]:
    return {"policy": policies, "route": [{"path": f"/{name}", "policy": name} for name in policies]}


#: A policy with a user of its own and most kinds of limits, and the same with a deadline that is met.
_TENANT: dict[str, Any] = {
    "isolation": "process",
    "user": TENANT,
    "group": TENANT,
    "groups": [61011],
    "cpu": "150%",
    "memory": "64M",
    "pids": 24,
    "concurrency": 4,
    "umask": "027",
    "rlimits": {"nofile": 256, "core": 0},
    "capabilities": ["net_bind_service"],
    "each": {"memory": "48M", "pids": 12, "timeout": "30s"},
}
_QUICK = {**_TENANT, "each": {**_TENANT["each"], "timeout": "150ms"}}


def process(case: Case) -> None:
    """Executor processes with a user of their own and most kinds of limits."""
    with files_of_the_application():
        _processes(case, {"p": _TENANT, "quick": _QUICK})


def same_user(case: Case) -> None:
    """Executor processes with the user of the server, whose limit on memory can grow."""
    policy: dict[str, Any] = {
        "isolation": "process",
        "memory": {"limit": "64M", "expand": "2x", "up_to": "128M"},
        "no_new_privs": False,
        "each": {"memory": "48M", "timeout": "30s"},
    }
    quick = {**policy, "each": {**policy["each"], "timeout": "150ms"}}
    _processes(case, {"p": policy, "quick": quick}, {"budget": {"memory": "256M", "wait": "1s"}})


def _local(case: Case, policy: dict[str, Any], **options: Any) -> None:
    def steps(manager: RunningManager) -> None:
        for phase in ("first", "second"):
            case.phase(phase)
            with case.refusing(phase):
                case.request(manager, phase, "report", "p")

    case.managed({"policy": {"p": policy}, "route": [{"policy": "p"}]}, steps, **options)


def thread(case: Case) -> None:
    """A thread with a user of its own, in a cgroup."""
    with tempfile.TemporaryDirectory(prefix="rcon-faults-") as folder:
        own = Path(folder, "anna.example")
        own.mkdir()
        os.chown(own, TENANT, TENANT)
        Path(folder).chmod(0o755)
        policy = {"isolation": "thread", "user": f"owner:{folder}/{{host}}", "pids": 50}
        _local(case, {**policy, "umask": "027", "concurrency": 4})


def inline(case: Case) -> None:
    """The serving thread, in and out of a cgroup."""
    _local(case, {"isolation": "inline", "pids": 50, "cpu": "150%"}, server=Server(threads=False))


def changing(case: Case) -> None:
    """A server of several processes with a user of its own, whose limits are changed while it serves."""
    policy: dict[str, Any] = {"isolation": "process", "user": "nobody", "memory": "64M"}
    before = open_kinds()
    case.phase("deploy")
    deployment = None
    with case.refusing("deploy"):
        judged = Manager(from_mapping({**_routed({"p": policy}), "cgroup": case.base}))
        deployment = judged.deploy(owner=(TENANT + 1, TENANT + 1), changeable=True)
    if deployment is None:
        case.said = True
        gc.collect()
        case.count_descriptors(before)
        return
    case.phase("start")
    with case.refusing("start"):
        manager = deployment.start(serve)
        case.phase("spawn")
        with case.refusing("spawn"):
            case.request(manager, "spawn", "report", "p")
        case.phase("change")
        name = "old"  # a limit that could not be changed, which the refusal says
        with case.refusing("change"):
            deployment.change("p", "memory", "96M")
            name = "changed"
        case.phase("changed")
        with case.refusing("changed"):
            case.request(manager, name, "report", "p")
        quiet(manager)
        case.phase("close")
        before_close = len(case.refusals)
        with case.refusing("close"):
            manager.close()
        del manager
        case.said = len(case.refusals) > before_close
    before_close = len(case.refusals)
    with case.refusing("remove"):
        deployment.close()
    case.said = case.said or len(case.refusals) > before_close
    del deployment, judged
    gc.collect()
    case.count_descriptors(before)


def _report_to_client(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer with what the process says of itself, once the body of the request was read."""
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(report_of_process()).encode()]


def request(case: Case) -> None:
    """Requests behind the WSGI middleware: a body, an answer, a client that sends too slowly for the deadline."""

    def respond(manager: RunningManager, name: str, path: str, *, expected: str = "200") -> None:
        statuses: list[str] = []

        def start_response(status: str, *_: object) -> Callable[[bytes], object]:
            statuses.append(status)
            return theirs.send  # which nothing calls

        ours, theirs = socket.socketpair()
        with ours, theirs, ours.makefile("rb") as from_client:
            environ: dict[str, Any] = {"PATH_INFO": path, "client": ours}
            environ["wsgi.input"] = io.BytesIO(b"a body") if expected == "200" else from_client
            setup_testing_defaults(environ)
            serve = ConfineMiddleware(
                _report_to_client, manager=manager, client_socket=lambda one: one["client"]
            )
            response = serve(environ, start_response)
            try:
                body = b"".join(response)
            finally:
                getattr(response, "close", bool)()
        if not statuses[0].startswith(expected):
            raise ConfinementError(f"status {statuses[0]}")
        if expected == "200":
            case.answers[name] = json.loads(body)

    def steps(manager: RunningManager) -> None:
        for phase in case.chosen(["spawn", "again", "timeout"]):
            case.phase(phase)
            path, expected = ("/quick", "504") if phase == "timeout" else ("/p", "200")
            with case.refusing(phase):
                respond(manager, phase, path, expected=expected)
            quiet(manager)

    settings = _routed({"p": _TENANT, "quick": _QUICK})
    case.managed(
        settings,
        steps,
        service=WsgiService(_report_to_client),
        again=lambda manager: respond(manager, "again", "/p"),
    )


def task(case: Case) -> None:
    """Celery's tasks: right answers, a death, a deadline, a task of a pool process that was killed, the shutdown."""
    before = open_kinds()
    with tempfile.TemporaryDirectory(prefix="rcon-faults-") as folder:
        _tasks(case, folder)
    gc.collect()
    case.count_descriptors(before)


def _tasks(case: Case, folder: str) -> None:
    late = {"isolation": "process", "each": {"memory": "48M"}, "on_memory": {"expand": "2x", "up_to": "96M"}}
    policies = {"tenant": _TENANT, "die": _TENANT, "quick": _QUICK, "late": late}
    policies["inline"] = {"isolation": "inline", "pids": 50, "cpu": "150%"}
    app = celery_pool.make(case.base, folder, policies)
    case.phase("deploy")
    case.said = True
    with case.refusing("deploy"):
        pool = celery_pool.PoolProcess(app)
        case.said = False
    if case.said:
        return
    tasks: dict[str, Callable[[], Any]] = {
        "spawn": lambda: pool.run("tenant"),
        "again": lambda: pool.run("tenant"),
        "redelivered": lambda: pool.run("late", 0, number="lost", redelivered=True, rcon_deaths=1),
        "inline": lambda: pool.run("inline"),
        "die": lambda: pool.run("die"),
        "timeout": lambda: pool.run("quick"),
    }
    expected: dict[str, tuple[type[Exception], ...]] = {"die": (Killed,), "timeout": (TimeLimitExceeded,)}

    def again() -> None:
        case.answers["again"] = pool.run("tenant")

    phases = case.chosen([*tasks], leads={"killed": "redelivered"})
    if "redelivered" in phases:
        case.phase("killed")
        _kill_in_a_task(pool, folder)
    home = Path("/proc/thread-self/cgroup").read_text()
    case.phase("start")
    pool.start()
    for phase in phases:
        case.phase(phase)
        with case.refusing(phase), contextlib.suppress(*expected.get(phase, ())):
            case.answers[phase] = tasks[phase]()
    case.recover(again, lambda: False)
    if Path("/proc/thread-self/cgroup").read_text() != home:
        case.faults.append("the process stays in the cgroup of a task")
    case.phase("close")
    before_close = len(pool.log.said)
    pool.end()
    case.said = len(pool.log.said) > before_close
    case.faults += pool.log.tracebacks


def _kill_in_a_task(pool: celery_pool.PoolProcess, folder: str) -> None:
    """Kill another pool process in a task, soon after it has stored its lease; if it ends before, reap it."""
    pid = os.fork()
    if pid == 0:
        _host_is_here()
        pool.run_until_killed("late", 60, number="lost")
    deadline = time.monotonic() + SLOW
    lives = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while time.monotonic() < deadline and os.waitid(os.P_PID, pid, lives) is None:
        if any("rcon-lease-lost" in path.name for path in Path(folder).iterdir()):
            time.sleep(0.2)
            break
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)  # a zombie at least
    os.waitpid(pid, 0)


def command(case: Case) -> None:
    """``rcon run``: a command with a user of its own, one whose memory can grow and that leaves a child, a timeout."""
    limits = ("--memory", "64M", "--swap", "0", "--pids", "24", "--cpu", "150%")
    grows = ("--memory", "64M", "--expand", "2x", "--up-to", "128M", "--on-event", "cat >/dev/null")
    shell = ("--", "sh", "-c")  # always the same command, so that all groups have the same kind of name
    says = (*shell, 'exec "$0" -I -c "$1"', PYTHON, PROGRAM)
    commands: dict[str, tuple[str, ...]] = {
        "user": ("--user", "nobody", *limits, "--timeout", "30s", *says),
        "grows": (*grows, *says),
        "leaves": (*limits, *shell, "setsid sleep 300 & exit 0"),
        "timeout": (*limits, "--timeout", "150ms", *shell, "exec sleep 60"),
    }
    with tempfile.TemporaryDirectory(prefix="rcon-faults-") as folder:
        for phase in commands if not case.armed else [case.armed]:
            expected = "rcon: wall time limit 0.15 s reached\n" if phase == "timeout" else ""
            case.command(phase, folder, *commands[phase], expected=expected)


def _host_is_here() -> None:
    Setup.host = os.getpid()


FUNCTIONS: dict[str, Callable[[Case], None]] = dict(
    zip(SCENARIOS, (process, same_user, thread, inline, changing, request, task, command), strict=True)
)
