"""gunicorn's server hooks as one object: set up in the master, confine in the workers, clean up at the end.

gunicorn calls ``on_starting``, ``on_reload``, ``nworkers_changed``, ``child_exit``, ``pre_exec`` and ``on_exit`` in the
master, as the user that started it. It calls ``post_fork`` in each worker, still as that user, and
``post_worker_init`` and ``worker_exit`` in each worker after ``--user`` and ``--group`` took effect.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, cast

from rcon_gunicorn.check import CheckFailed, checked_configuration, look_where_it_will_serve
from rcon_gunicorn.logs import error_log, join_error_log, leaving_log_files, open_log_files
from rcon_gunicorn.master import Master, judge
from rcon_gunicorn.trial import TrialPassed, keep_old_workers, make_newer_workers, restore_workers, why_not
from rcon_gunicorn.workers import after_fork, refusal, server_traits
from rcon_plugins.confinement.manager import Manager
from rcon_plugins.confinement.running import RunningManager
from rcon_plugins.errors import ConfinementError, RconError
from rcon_wsgi import ConfineMiddleware, WsgiService

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication

#: The environment variable with the path of the settings file.
SETTINGS_VARIABLE = "RCON_SETTINGS"


class Arbiter(Protocol):
    """The attributes of gunicorn's master that these hooks use."""

    cfg: Any
    log: Any
    worker_class: type


class Worker(Protocol):
    """The attributes of a gunicorn worker that these hooks use."""

    cfg: Any
    log: Any
    pid: int
    tmp: Any
    wsgi: Any
    alive: bool
    booted: bool

    def notify(self) -> None:
        """Tell the master that this worker lives."""


class StartRefused(RconError, RuntimeError):
    """Raised in the master when it must not start. gunicorn prints the message alone and exits with 1."""


class WorkerRefused(SystemExit):
    """Ends one worker with status 1, once the reason is logged.

    Not an `Exception`: gunicorn logs a traceback for each of those.
    """


class Hooks:
    """The server hooks that confine each request of this gunicorn.

    ``settings`` is the path of the policy file; None reads the environment variable ``RCON_SETTINGS`` when gunicorn
    starts. One object serves one gunicorn: assign its methods to the settings of the same names, or call `install`.
    """

    NAMES = (
        "on_starting",
        "on_reload",
        "nworkers_changed",
        "post_fork",
        "post_worker_init",
        "worker_exit",
        "child_exit",
        "pre_exec",
        "on_exit",
    )

    def __init__(self, settings: str | os.PathLike[str] | None = None) -> None:
        self._path = None if settings is None else os.fspath(settings)
        self._master: Master | None = None
        self._manager: RunningManager | None = None
        #: The number of workers before the last change.
        self._workers_before: int | None = None
        self._on_trial = False

    def install(self, config: MutableMapping[str, Any]) -> None:
        """Set all hooks in a configuration file: call it last, with ``globals()``.

        A hook that the file itself defines is kept. It runs first, so that a wrapper that it puts around the
        application is confined too. The hook of this class runs even if that one raises. `check_config` is called.
        """
        self.check_config(config)
        for name in self.NAMES:
            ours = getattr(self, name)
            theirs = config.get(name)
            config[name] = ours if theirs is None else chain(theirs, ours)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Judge the policy file if this is ``gunicorn --check-config``; otherwise do nothing.

        gunicorn calls no hook then. ``config`` is the namespace of the configuration file: call it last. Nothing is
        made. Ends gunicorn with status 1 and one line, as its start would, if it would not start.
        """
        cfg = checked_configuration(config)
        if cfg is None:
            return
        look_where_it_will_serve(cfg)
        try:
            path = self._settings_path(cfg.env)
            if Path(cfg.chdir) != Path.cwd():
                path = str(Path(cfg.chdir, path))
            judge(path, cfg.worker_class).plan.load_function()
        except RconError as error:
            raise CheckFailed(f"Error: {error}") from None

    # in the master

    def on_starting(self, server: Arbiter) -> None:
        """Load and judge the settings, and make this server's part of the cgroup tree."""
        join_error_log()
        try:
            self._master = Master.start(self._settings_path(), server)
        except RconError as error:
            if server.cfg.errorlog != "-":  # the standard error of a daemon is lost
                server.log.error("rcon: %s", error)
            raise StartRefused(str(error)) from None
        # A reload executes the configuration file again, which makes new Hooks. They find the master's state here.
        cast(Any, server).rcon = self._master

    # gunicorn counts the parameters
    def nworkers_changed(self, server: Arbiter, new_value: int, old_value: int | None) -> None:  # noqa: ARG002
        """Remember the number of workers before a reload: gunicorn sets the new one before it calls `on_reload`."""
        self._workers_before = old_value

    def on_reload(self, server: Arbiter) -> None:
        """Read the policy file again, and make one worker on trial before gunicorn ends the old ones.

        If the new settings are wrong, or no worker can serve with them, keep the old settings. If no worker can serve
        with those either, refuse the reload: the old workers go on.
        """
        if server_traits(server.worker_class) is None:
            from gunicorn.errors import HaltServer  # type: ignore[import-untyped]

            raise HaltServer(refusal(server.worker_class))
        self._master = getattr(server, "rcon", None)
        master = self._started()
        make_newer_workers(server)
        refused: object = None
        try:
            manager = judge(self._settings_path(), server.worker_class, master.deployment)
            if (refused := self._why_not(server, manager)) is None:
                master.reload(manager, server)
                return
        except RconError as error:
            refused = error
        reason = self._why_not(server, None)
        if reason is None:
            server.log.error("rcon: the new settings are refused, the old ones stay: %s", refused)
        else:
            server.log.error("rcon: the reload is refused, the old workers go on: %s", reason)
            keep_old_workers(server, self._workers_before)

    def _why_not(self, server: Arbiter, manager: Manager | None) -> str | None:
        """Return why no worker can serve with these settings, by default the present ones; None if one can."""
        master = self._started()

        def prepare() -> None:
            self._on_trial = True
            if manager is not None:
                master.deployment.reload(manager)

        try:
            return why_not(server, prepare, lambda pid: master.sweep(pid, server))
        except RconError as error:
            return str(error)

    def child_exit(self, server: Arbiter, worker: Worker) -> None:
        """Remove the cgroups and processes that a killed worker left behind."""
        master: Master | None = getattr(server, "rcon", None)
        if master is not None:
            master.sweep(worker.pid, server)

    def pre_exec(self, server: Arbiter) -> None:
        """Leave this server's part of the cgroup tree. The next program makes its own (USR2)."""
        master: Master | None = getattr(server, "rcon", None)
        if master is not None:
            master.leave()

    def on_exit(self, server: Arbiter) -> None:
        """Remove this server's part of the cgroup tree. Kill the processes that still run there."""
        master: Master | None = getattr(server, "rcon", None)
        if master is not None:
            master.close()

    # in the worker

    def post_fork(self, server: Arbiter, worker: Worker) -> None:
        """Keep the capabilities that policies with an identity need when the worker changes to ``--user``."""
        restore_workers(server)
        with self._failing_alone(worker):
            self._started().keep_privileges(server)

    def post_worker_init(self, worker: Worker) -> None:
        """Confine the loaded application, before the worker serves.

        An exception ends the worker before it serves anything, and then gunicorn, unless a worker served before. Then
        the worker ends alone, after a pause that grows, and gunicorn makes another.
        """
        traits = server_traits(type(worker))
        if traits is None:
            raise ConfinementError(refusal(type(worker)))
        master = self._started()
        with self._failing_alone(worker):
            master.settle_privileges()
            join_error_log()
            manager = master.deployment.start(
                WsgiService(worker.wsgi),
                on_lost=functools.partial(_replace, worker),
                after_fork=[*after_fork(traits), leaving_log_files()],
                # With the heartbeat file a request could keep a hung worker alive; with a log file it could empty the
                # log.
                server_files=[worker.tmp.fileno(), *open_log_files(worker.log)],
                log=error_log(),
            )
        self._manager = manager
        if self._on_trial:
            raise TrialPassed
        worker.wsgi = _while_master_lives(
            ConfineMiddleware(
                worker.wsgi, manager=manager, client_socket=None if traits.greenlets else client_socket
            ),
        )
        master.boots.started()

    def worker_exit(self, server: Arbiter, worker: Worker) -> None:
        """End the worker's executor processes."""
        if worker.pid != os.getpid():  # gunicorn calls this in the master for a worker that it did not find
            self.child_exit(server, worker)
        elif self._manager is not None:
            self._manager.close()

    @contextlib.contextmanager
    def _failing_alone(self, worker: Worker) -> Iterator[None]:
        """End only this worker, after a pause, if the block fails and a worker of this server served before.

        Otherwise the exception ends gunicorn, or the trial.
        """
        try:
            yield
        except Exception as error:
            pause = None if self._on_trial else self._started().boots.failed()
            if pause is None:
                raise
            worker.log.error(
                "rcon: this worker cannot confine requests; gunicorn makes another in %g s: %s", pause, error
            )
            parent, until = os.getppid(), time.monotonic() + pause
            while time.monotonic() < until and worker.alive and os.getppid() == parent:
                worker.notify()  # its master would take it for hung
                time.sleep(0.1)
            worker.booted = True  # an exception before that ends gunicorn
            if isinstance(error, RconError):
                raise WorkerRefused(1) from None
            raise

    def _settings_path(self, raw_env: Mapping[str, str] = MappingProxyType({})) -> str:
        """Return the path. ``raw_env`` is what gunicorn will add to the environment."""
        path = self._path or raw_env.get(SETTINGS_VARIABLE) or os.environ.get(SETTINGS_VARIABLE)
        if not path:
            raise StartRefused(
                f"no settings: set the path of the policy file, as in {SETTINGS_VARIABLE}=/etc/rcon.toml"
            )
        return path

    def _started(self) -> Master:
        if self._master is None:
            raise ConfinementError(
                "gunicorn did not call on_starting of these hooks: assign all of them, or use Hooks.install"
            )
        return self._master


def chain(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that calls both functions, the second even if the first raises."""

    @functools.wraps(first)
    def both(*arguments: Any) -> None:
        try:
            first(*arguments)
        finally:
            second(*arguments)

    return both


def client_socket(environ: dict[str, Any]) -> Any:
    """Return the connection of a request; None if other requests share it."""
    if "gunicorn.http2.send_trailers" in environ:
        return None  # HTTP/2
    return environ.get("gunicorn.socket")


def _while_master_lives(app: WSGIApplication) -> WSGIApplication:
    """Return an application that ends the worker gracefully after the first request if the master is gone.

    gunicorn's worker detects that only when it is idle. Until then it would serve beside the next gunicorn, in cgroups
    that the next gunicorn removed.
    """
    master = os.getppid()

    def serve(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if os.getppid() != master:
            os.kill(os.getpid(), signal.SIGTERM)
        return app(environ, start_response)

    return serve


def _replace(worker: Worker) -> None:
    """End this worker gracefully, because its fork server has ended. The master makes a new worker."""
    worker.log.error("rcon: the fork server has ended; this worker finishes its requests and is replaced")
    os.kill(os.getpid(), signal.SIGTERM)
