"""`install`: confine the tasks of one application, in the worker and in each process of its pool."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping
from typing import Any

import msgspec
from celery import signals

from rcon_celery import codec, remote_control, results
from rcon_celery.call import is_celerys_own
from rcon_celery.decorator import TaskPolicy, policy_of_class
from rcon_celery.handlers import Handlers, Side, handler_side
from rcon_celery.pool_process import PoolProcess
from rcon_celery.retry.attempt import RetryPolicy
from rcon_celery.task_annotations import Annotations, TaskCode
from rcon_celery.termination import killing_request
from rcon_celery.worker import ConfinedTasks, ConfinedWorker, pool_of, start_step
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.file import Settings, load
from rcon_plugins.settings.policy import Policy

_log = logging.getLogger("rcon")


def install(
    app: Any,
    settings: Settings | str | os.PathLike[str] | None = None,
    *,
    handler_sides: Mapping[str, Side] | None = None,
) -> None:
    """Confine the tasks of a Celery application wherever a worker runs them.

    A task with `confined` gets the policy of the decorator. All other tasks get their policy from the routes of
    ``settings`` (a policy file or `Settings`), by name (``task``) and queue (``queue``). Without settings they are not
    confined. The file is read when a worker starts. A worker does not start if the settings are wrong, or if this
    machine cannot enforce them.

    ``handler_sides`` says where the handlers of Celery's signals run, by the name of their module or of a package that
    holds it: "inside" (the executor process), "outside" (the pool's process) or "both"; see `handler_side`.

    Call it where the application is made, before its tasks are used. Raises `SettingsError` if it is called too late or
    twice.
    """
    if getattr(app, "rcon", None) is not None:
        raise SettingsError(
            "the application is installed already", key="rcon_celery.install", hint="call it once"
        )
    if app.finalized:
        raise SettingsError(
            "the tasks of the application are in use already",
            key="rcon_celery.install",
            hint="call it where the application is made",
        )
    app.rcon = Installation(app, settings, handler_sides or {})


class Installation:
    """The confinement of one application, as ``app.rcon``."""

    def __init__(
        self, app: Any, settings: Settings | str | os.PathLike[str] | None, sides: Mapping[str, Side]
    ) -> None:
        self._app = app
        self._given = settings
        self._handlers = Handlers(self, sides)
        #: The code of each task, by the name of the task.
        self._codes: dict[str, TaskCode] = {}
        self._task_policies: dict[str, TaskPolicy] = {}
        #: The worker of this process; None in other programs that load the application.
        self.worker: ConfinedWorker | None = None
        self._process: PoolProcess | None = None
        #: Runs tasks confined; None outside of workers, and in executor processes, which are confined already.
        self.runner: PoolProcess | None = None
        remote_control.register()
        app.on_after_configure.connect(self._annotate, weak=False)
        if app.configured:
            self._annotate()
        app.steps["worker"].add(start_step(self._start_worker))
        signals.worker_process_init.connect(self._start_pool_process, weak=False)
        signals.worker_process_shutdown.connect(self._close_pool_process, weak=False)
        signals.worker_shutdown.connect(self._close_worker_first, weak=False)

    def register(self, cls: Any, code: TaskCode) -> bool:
        """Note the class and code of a task; return False for a task that is never confined."""
        task_policy = policy_of_class(cls)
        if task_policy is not None:
            self._task_policies[cls.name] = task_policy
        elif is_celerys_own(cls):
            return False
        self._codes[cls.name] = code
        return True

    def request_class(self, own: object) -> type:
        """Return the class of the requests of a task, made from its own."""
        return killing_request(own, self)

    def kill(self, task: Any, task_id: str, ending: Exception) -> bool:
        """Kill the body of a task if this process runs it in an executor process; return whether it does.

        With prefork, Celery kills the process of the pool, and the body ends with that.
        """
        process = self.runner
        if process is None or process.is_of_pool or task.name not in self._codes:
            return False
        return process.running_tasks.kill(task_id, ending)

    def confines(self, task: Any) -> bool:
        """Return whether this process passes the body of this task on to its runner."""
        return (
            self.runner is not None
            and task.app is self._app
            and task.name in self._codes
            and not task.request.is_eager
        )

    def _annotate(self, **_: object) -> None:
        """Annotate the tasks of the application. Call it once the configuration is read."""
        own = self._app.conf.task_annotations
        if not isinstance(own, Annotations):
            self._app.conf.task_annotations = Annotations(own, self)
            results.add_to_backend(self._app)

    def _start_worker(self, parent: Any) -> None:
        """Confine the tasks of Celery's worker ``parent``, which is starting. Raises `RconError`."""
        pool = pool_of(parent.pool_cls, parent.pool_start_method, restarts=bool(parent.pool_restarts))
        settings = self._settings()
        tasks = self._confined_tasks(settings)
        worker = ConfinedWorker.start(settings, tasks, pool, parent.hostname, self._largest_memory())
        worker.sends_events = bool(parent.task_events)
        for why in codec.why_unbounded(codec.accepted_encodings(self._app)):
            _log.warning("rcon: %s; accept only json from code that you do not trust", why)
        retry_policies = {
            task: policy.retry for task, policy in self._task_policies.items() if policy.retry is not None
        }
        self.worker = worker
        self._process = PoolProcess(
            self._app, worker, self._codes, retry_policies, self._enter_executor, self._handlers
        )
        # The last of them: some handlers of this signal connect others.
        signals.worker_process_init.connect(self._divide_handlers, weak=False)
        self._handlers.divide()
        self.runner = self._process
        if not self.runner.is_of_pool:
            self.runner.start()
            atexit.register(self.runner.close)  # before the worker's own, which removes all cgroups

    @handler_side("outside")
    def _start_pool_process(self, **_: object) -> None:
        if self.runner is not None and self.runner.is_of_pool:
            self.runner.try_to_start()  # Celery would ignore an exception

    @handler_side("outside")
    def _divide_handlers(self, **_: object) -> None:
        self._handlers.divide()

    def _enter_executor(self) -> None:
        """Note that this process is an executor process now."""
        self.runner = None

    def _close_pool_process(self, **_: object) -> None:
        if self._process is not None:
            self._process.close()

    def _close_worker_first(self, **_: object) -> None:
        if self.worker is not None:
            self.worker.close_before_restart()
        if self._process is not None and not self._process.is_of_pool:
            atexit.unregister(self._process.close)
            atexit.register(self._process.close)

    def _settings(self) -> Settings:
        """Return the settings. Read the file again. Raises `SettingsError`."""
        if self._given is None:
            return Settings(unmatched="allow")
        return self._given if isinstance(self._given, Settings) else load(self._given)

    def _confined_tasks(self, settings: Settings) -> ConfinedTasks:
        """Return the policy of each task with `confined`, made from its limits or named in the settings."""
        names: dict[str, str] = {}
        made: list[Policy] = []
        taken = set(settings.policies)
        for task, task_policy in sorted(self._task_policies.items()):
            if task_policy.name is None:
                policy = task_policy.make(task, taken)
                taken.add(policy.name)
                made.append(policy)
                names[task] = policy.name
            elif task_policy.name in settings.policies or settings.plugins:
                names[task] = task_policy.name
                _check_retry(task, task_policy, settings.policies)
            else:
                raise SettingsError(
                    f"there is no policy {task_policy.name!r}",
                    key=f"@confined of {task}",
                    file=settings.file,
                    hint=f"one of: {', '.join(settings.policies)}"
                    if settings.policies
                    else "add the policy to the settings, or write its limits",
                )
        return ConfinedTasks(names, made)

    def _largest_memory(self) -> dict[str, int]:
        """Return the most memory, in bytes, that each task may get on a retry, by its key in an error message."""
        found = {}
        for task, task_policy in sorted(self._task_policies.items()):
            retry = task_policy.retry if task_policy.name is not None else task_policy.make(task, ())
            if retry is not None and retry.on_memory is not None:
                found[f"@confined of {task}: on_memory.up_to"] = retry.on_memory.up_to
        return found


def _check_retry(task: str, task_policy: TaskPolicy, policies: Mapping[str, Policy]) -> None:
    """Raise `SettingsError` if the retry keys of a task contradict the policy that it names."""
    policy = policies.get(task_policy.name or "")
    retry: RetryPolicy | None = task_policy.retry
    if policy is None or retry is None:
        return
    try:
        msgspec.structs.replace(policy, **retry.keys())
    except SettingsError as error:
        raise SettingsError(error.problem, key=f"@confined of {task}: {error.key}", hint=error.hint) from None
