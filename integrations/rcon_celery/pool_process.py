"""A process that confines tasks: one of a prefork pool, or the worker's own process with the other pools."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from celery.exceptions import Reject, SoftTimeLimitExceeded
from celery.utils.log import get_logger, get_multiprocessing_logger, mlevel

from rcon_celery import codec, log_lines, results
from rcon_celery.call import SoftTimeLimit, run_in_process, run_in_thread, work_of
from rcon_celery.retry import due
from rcon_celery.retry.attempt import Attempt, ProcessLost, RetryPolicy
from rcon_celery.retry.lease import Heartbeat
from rcon_celery.service import TaskService
from rcon_celery.termination import RunningTasks
from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.confinement.running import RunningManager
from rcon_plugins.errors import (
    ConcurrencyLimitExceeded,
    ConfinementError,
    MemoryLimitExceeded,
    RconError,
)
from rcon_plugins.executors import log_files
from rcon_plugins.executors.records import RecordLog
from rcon_plugins.settings.budget import BUDGET

if TYPE_CHECKING:
    from rcon_celery.handlers import Handlers
    from rcon_celery.task_annotations import TaskCode
    from rcon_celery.worker import ConfinedWorker
    from rcon_plugins.confinement.admission import LocalAdmission
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.work import Work

_log = logging.getLogger("rcon")

#: How many times to try a task that did not begin because the fork server ended, and how many times to try a start.
_ATTEMPTS: Final = 3
#: The pause between tries to start, seconds.
_PAUSE: Final = 1.0
#: A part of the names of billiard's shared memory files.
_BILLIARD_FILE: Final = "/pymp-"


class PoolProcess:
    """Runs the tasks of this process confined. `start` it in the process that runs tasks."""

    def __init__(
        self,
        app: Any,
        worker: ConfinedWorker,
        codes: Mapping[str, TaskCode],
        retry_policies: Mapping[str, RetryPolicy],
        after_fork: Callable[[], object],
        handlers: Handlers,
    ) -> None:
        """``codes`` and ``retry_policies`` are by the name of the task.

        ``after_fork`` is called in each new executor process. ``handlers`` are those of Celery's signals.
        """
        self._app = app
        self._worker = worker
        self._codes = codes
        self._retry_policies = retry_policies
        self._after_fork = after_fork
        self._handlers = handlers
        self._manager: RunningManager | None = None
        self._pid = 0
        #: The reason why there is no manager.
        self._problem = "it was not started"
        #: Whether a policy has keys of a `RetryPolicy`.
        self._policies_retry = False
        self._heartbeat = Heartbeat()
        self.running_tasks = RunningTasks()
        self.accepted: Mapping[str, str] = {}
        #: Whether the fork server ended before `close`.
        self.is_lost = False
        self.soft_time_limit: SoftTimeLimit | None = SoftTimeLimit() if worker.pool.children else None

    @property
    def is_of_pool(self) -> bool:
        """Whether tasks run in processes that the pool forks. Each of them starts a `PoolProcess`."""
        return self._worker.pool.children

    def start(self) -> None:
        """Start the manager and its fork server. Raises `RconError`."""
        worker, server = self._worker, self._worker.pool.server
        log_lines.name_lines()
        self.accepted = codec.accepted_encodings(self._app)
        records = RecordLog(
            get_logger("celery.redirected"),
            mlevel(self._app.conf.worker_redirect_stdouts_level),
            [*_loggers(), get_multiprocessing_logger()],
        )
        service = TaskService(
            self._app, self._codes, worker.hostname, self._handlers, records, greenlets=server.greenlets
        )
        after_fork = [self._after_fork, service.install_signal_handlers]
        if server.greenlets:
            import gevent  # type: ignore[import-untyped]

            after_fork.append(gevent.reinit)  # otherwise it would use the worker's loop and threads
        manager = worker.deployment.start(
            service,
            on_lost=self._lost,
            after_fork=after_fork,
            server_files=server_files(),
            log=records,
        )
        self._manager, self._pid, self.is_lost = manager, os.getpid(), False
        self._policies_retry = any(
            policy.retry_keys for policy in worker.deployment.plan.settings.policies.values()
        )

    def try_to_start(self) -> bool:
        """Start, or log the reason if that fails. The next task tries again."""
        try:
            self.start()
        except (RconError, OSError) as error:
            self._problem = str(error)
            _log.error("rcon: this pool process cannot confine tasks: %s", error)
            return False
        return True

    def close(self) -> None:
        """End all executor processes of this process. Log it if their cgroups cannot be removed."""
        manager, self._manager = self._manager, None
        if manager is None or self._pid != os.getpid():
            return
        try:
            manager.close()
        except (RconError, OSError) as error:
            _log.warning(
                "rcon: cgroups of this pool process are left; the next one, or the end of the worker, removes them: %s",
                error,
            )

    def run(self, task: Any, code: TaskCode, args: Any, kwargs: Any) -> Any:
        """Run a task confined; return its result or raise its exception."""
        if self._manager is None and self._worker.pool.single_threaded:
            self._start_again(task)
        if self.is_lost:
            self._replace_fork_server(task)
        work = work_of(task, args, kwargs)
        retry_policy = self._retry_policies.get(task.name)
        if self._policies_retry:
            retry_policy = RetryPolicy.of(self._policy_of(task, work), retry_policy)
        attempt = Attempt(task, retry_policy)
        if attempt.redelivered:
            self._worker.deployment.instance.end_orphans()  # it may still run for a process that is gone
        if not task.acks_late:
            due.claim(task)
            return self._run_attempt(task, code, args, kwargs, work, attempt)
        with attempt.leased(self._heartbeat):
            return self._run_attempt(task, code, args, kwargs, work, attempt)

    def _run_attempt(
        self, task: Any, code: TaskCode, args: Any, kwargs: Any, work: Work, attempt: Attempt
    ) -> Any:
        try:
            admission = self._admit(task, work, attempt)
            process = admission if isinstance(admission, ProcessAdmission) else None
            try:
                with self.running_tasks.running(task.request.id, process):
                    if isinstance(admission, ProcessAdmission):
                        return run_in_process(task, admission, args, kwargs, self)
                    if admission is None:
                        body = partial(code.execute, task, args, kwargs)
                        return self._handlers.call(task, args, kwargs, body, outside_too=True)
                    return run_in_thread(task, code, admission, args, kwargs, self._handlers)
            finally:
                outcome = admission.outcome if admission is not None else None
                if outcome is not None:
                    results.record(task, outcome, send_event=self._worker.sends_events)
        except MemoryLimitExceeded as error:
            raise attempt.after_memory_death(error) from None

    def _admit(self, task: Any, work: Work, attempt: Attempt) -> LocalAdmission | ProcessAdmission | None:
        """Admit a task once there is room. Send a task back to its queue if the budget has no room for it."""
        failures = 0
        while True:
            manager = self._started_manager(task)
            try:
                return manager.admit(work, wait=True, memory=attempt.memory)
            except ConcurrencyLimitExceeded as error:
                if error.limit != BUDGET:
                    raise
                retry = attempt.back_to_queue(error)
                if retry is not None:
                    raise retry from None
            except ConfinementError as error:
                _raise_soft_limit(error)  # while it waited
                # It has not begun, so it may be tried again.
                failures += 1
                if not manager.is_lost or not self._replace_fork_server(task):
                    raise
                if failures == _ATTEMPTS:
                    if task.acks_late:
                        raise ProcessLost(str(error)) from None
                    raise

    def _policy_of(self, task: Any, work: Work) -> Policy | None:
        try:
            return self._started_manager(task).policy_of(work)
        except ConfinementError as error:
            _raise_soft_limit(error)
            raise

    def _started_manager(self, task: Any) -> RunningManager:
        if self._manager is None or self._pid != os.getpid():
            raise ConfinementError(f"{task.name}: this pool process cannot confine tasks: {self._problem}")
        return self._manager

    def _lost(self) -> None:
        """Note that the fork server ended. Runs in another thread."""
        self.is_lost = True
        if not self._worker.pool.single_threaded:
            # This process has other threads, so it cannot fork a fork server. Finish running tasks and begin no others.
            _log.error("rcon: the fork server ended; this worker finishes its tasks and exits")
            os.kill(os.getpid(), signal.SIGTERM)

    def _replace_fork_server(self, task: Any) -> bool:
        """Start another fork server. Return False if this process cannot and the task cannot be rejected.

        Raises `Reject`, `ConfinementError`.
        """
        if self._worker.pool.single_threaded:
            _log.error("rcon: the fork server of this pool process ended; starting another")
            self.close()
            self._start_again(task)
            return True
        if task.acks_late:
            raise Reject(f"{task.name}: the fork server of this worker ended", requeue=True)
        return False

    def _start_again(self, task: Any) -> None:
        """Start, after the first start failed or the fork server ended.

        If some tries fail, send a task that is acknowledged late back to its queue. Raises `Reject`.
        """
        self._heartbeat.stop()  # this process must not fork beside another thread
        for _ in range(_ATTEMPTS):
            if self.try_to_start():
                return
            time.sleep(_PAUSE)  # leave the tasks to processes that can confine them
        if task.acks_late:
            raise Reject(
                f"{task.name}: this pool process cannot confine tasks: {self._problem}", requeue=True
            )


def _raise_soft_limit(error: ConfinementError) -> None:
    """Raise the exception of a soft time limit itself if the manager refused the task for it."""
    if isinstance(error.__cause__, SoftTimeLimitExceeded):
        raise error.__cause__ from None


def server_files() -> list[int]:
    """Return the descriptors of the worker's log files and of its pool's shared memory, which executors must not have.

    Standard output and standard error are not among them; sockets and pipes are closed anyway.
    """
    found = log_files.open_log_files(_loggers()) | log_files.open_files_named(_BILLIARD_FILE)
    return sorted(descriptor for descriptor in found if descriptor > 2)


def _loggers() -> list[logging.Logger]:
    """Return all loggers, because Celery writes the lines of all of them to its log."""
    known = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(each for each in known if isinstance(each, logging.Logger))]
