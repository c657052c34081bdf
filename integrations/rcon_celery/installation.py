"""`install`: what confines the tasks of one application, in the worker and in each process of its pool."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from celery import signals as on
from celery._state import _task_stack
from celery.exceptions import Reject, SoftTimeLimitExceeded, TaskPredicate

from rcon_celery import cluster, codec, place, remote_call, results
from rcon_celery.bootstep import make_step
from rcon_celery.decorator import Mark, mark_of
from rcon_celery.files import leaving_log_files, server_files
from rcon_celery.pools import after_fork
from rcon_celery.retry import redelivery
from rcon_celery.retry.attempt import Attempt, Learning, ServerLost
from rcon_celery.retry.lease import Heartbeat
from rcon_celery.service import TaskService
from rcon_celery.task_annotations import Annotations, Body, perform
from rcon_celery.work import is_own, work_of
from rcon_celery.worker import Node
from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.confinement.manager import Manager
from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError, RconError, SettingsError
from rcon_plugins.settings.budget import BUDGET
from rcon_plugins.settings.file import Settings, load
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.units import Size

if TYPE_CHECKING:
    from rcon_plugins.confinement.admission import LocalAdmission
    from rcon_plugins.work import Work

_log = logging.getLogger("rcon")

#: How often a task is to begin whose fork server ends each time.
_ATTEMPTS = 3
#: How long a process that cannot confine tasks waits before it tries again, seconds.
_PAUSE = 1.0


def install(app: Any, settings: Settings | str | os.PathLike[str] | None = None) -> None:
    """Confine the tasks of a Celery application wherever a worker runs them.

    Tasks with `confined` have the policy it says. All others have that which the routes of ``settings``, a policy file
    or `Settings`, give them by name (``task``) and queue (``queue``); without settings they run as ever. The file is
    read when a worker starts, and wrong settings keep it from starting, as does what this machine cannot enforce.

    Call it where the application is made, before its tasks are used. Raises `SettingsError` when that is too late, or
    when it was called before.
    """
    if getattr(app, "rcon", None) is not None:
        raise SettingsError("the application was installed already", key="rcon_celery.install")
    if app.finalized:
        raise SettingsError(
            "the tasks of the application are in use already",
            key="rcon_celery.install",
            hint="call it where the application is made",
        )
    app.rcon = Installation(app, settings)


class Installation:
    """What `install` leaves on an application, as ``app.rcon``."""

    def __init__(self, app: Any, settings: Settings | str | os.PathLike[str] | None) -> None:
        self._app = app
        self._given = settings
        self._bodies: dict[str, Body] = {}
        self._marks: dict[str, Mark] = {}
        self.node: Node | None = None
        self.manager: Manager | None = None
        self._pid = 0
        self.notices = remote_call.Notices()
        self.accepted: set[str] = set()
        #: The fork server has ended before its time.
        self.is_lost = False
        #: Why this process of the pool has no manager.
        self._fault = "it was not set up"
        self._pulse = Heartbeat()
        #: Whether a policy says what becomes of tasks that died.
        self._policies_try = False
        cluster.register()
        app.on_after_configure.connect(self._annotate, weak=False)
        if app.configured:
            self._annotate()
        app.steps["worker"].add(make_step(self))
        on.worker_process_init.connect(self._pool_process_starts, weak=False)
        on.worker_process_shutdown.connect(self._pool_process_ends, weak=False)
        on.worker_shutdown.connect(self._worker_ends, weak=False)

    # when tasks are bound

    def _annotate(self, **_: object) -> None:
        theirs = self._app.conf.task_annotations
        if not isinstance(theirs, Annotations):
            self._app.conf.task_annotations = Annotations(theirs, self)
            results.add_to_backend(self._app)

    def adopt(self, cls: Any, body: Body) -> bool:
        """Take note of a task's class; False where it is never confined."""
        mark = mark_of(cls)
        if mark is not None:
            self._marks[cls.name] = mark
        elif is_own(cls):
            return False
        self._bodies[cls.name] = body
        return True

    # when a worker starts

    def settings(self) -> Settings:
        """The settings, from the file as it is now. Raises `SettingsError`."""
        if self._given is None:
            return Settings(unmatched="allow")
        return self._given if isinstance(self._given, Settings) else load(self._given)

    def marked(self, settings: Settings) -> tuple[dict[str, str], list[Policy]]:
        """The policies of tasks with `confined`: their names, by task, and those that are not in the settings."""
        names: dict[str, str] = {}
        policies: dict[str, Policy] = dict(settings.policies)
        made: list[Policy] = []
        for task, mark in sorted(self._marks.items()):
            if mark.policy is None:
                policy = mark.named(task, policies)
                policies[policy.name] = policy
                made.append(policy)
                names[task] = policy.name
            elif mark.policy in settings.policies or settings.plugins:
                names[task] = mark.policy
                _check_tries(task, mark, settings)
            else:
                raise SettingsError(
                    f"there is no policy {mark.policy!r}",
                    key=f"@confined of {task}",
                    file=settings.file,
                    hint=f"one of: {', '.join(settings.policies)}"
                    if settings.policies
                    else "write it, or its limits",
                )
        return names, made

    def most(self) -> dict[str, Size]:
        """By its key in an error, the most memory that each task which learns may be given."""
        found = {}
        for task, mark in sorted(self._marks.items()):
            says = mark.learning if mark.policy is not None else mark.named(task, ())
            if says is not None and says.on_memory is not None:
                found[f"@confined of {task}: on_memory.up_to"] = says.on_memory.up_to
        return found

    def begin(self, node: Node) -> None:
        """In the worker: tasks are confined from here on. Raises `RconError` where that cannot be."""
        self.node = node
        if not node.pool.children:
            self._start_manager()

    def _pool_process_starts(self, **_: object) -> None:
        if place.is_executor() or self.node is None or not self.node.pool.children:
            return
        self._try_to_start()  # Celery would go on, whatever is raised; it is tried again when a task comes

    def _try_to_start(self) -> bool:
        try:
            self._start_manager()
        except (RconError, OSError) as error:
            self._fault = str(error)
            _log.error("rcon: this process of the pool cannot confine tasks: %s", error)
            return False
        return True

    def _start_manager(self) -> None:
        node = self._ready_node()
        self.accepted = codec.accepted(self._app)
        manager = Manager(
            node.settings,
            server=node.pool.server,
            instance=node.instance,
            plugins=node.plugins,
            on_lost=self._lose,
            changes=node.changes,
        )
        service = TaskService(self._app, self._bodies, node.hostname, greenlets=node.pool.server.greenlets)
        manager.start(
            service,
            after_fork=[*after_fork(node.pool), leaving_log_files(), service.expect_notices],
            server_files=[*server_files(), node.tally.file, node.changes.file],
        )
        self.manager, self._pid, self.is_lost = manager, os.getpid(), False
        self._policies_try = any(policy.wants_tries for policy in manager.settings.policies.values())

    def _lose(self) -> None:
        """In another thread: the fork server is gone."""
        self.is_lost = True
        if not self._ready_node().pool.alone:
            # No fork server can be made beside other threads; so what is under way is done, and nothing begun.
            _log.error("rcon: the fork server is gone; this worker finishes its tasks and ends")
            os.kill(os.getpid(), signal.SIGTERM)

    def _pool_process_ends(self, **_: object) -> None:
        self.close()

    def _worker_ends(self, **_: object) -> None:
        if self.node is not None:
            self.node.close_first()

    def close(self) -> None:
        """End all executor processes of this process."""
        if self.manager is not None and self._pid == os.getpid():
            self.manager.close()
            self.manager = None

    # when a task runs

    @property
    def is_of_pool(self) -> bool:
        """Whether this process is one of a pool's, and not the worker itself."""
        return self._ready_node().pool.children

    def takes_over(self, task: Any) -> bool:
        """Whether this process is one that confines tasks."""
        return self.node is not None and not place.is_executor() and not task.request.is_eager

    def hand_over(self, task: Any, body: Body, args: Any, kwargs: Any) -> Any:
        """Run a task's body confined, and return or raise what it does."""
        if self.manager is None and self._ready_node().pool.alone:
            self._set_up(task)
        self._ready_manager()
        if self.is_lost:
            self._find_another_server(task)
        if redelivery.is_redelivered(task):
            self._ready_node().instance.end_orphans()  # it may still run for a process that is gone
        work = work_of(task, args, kwargs)
        lesson = Attempt(task, self._learning_of(task, work))
        return lesson.run(self._pulse, lambda lesson: self._confine(task, body, args, kwargs, work, lesson))

    def _learning_of(self, task: Any, work: Work) -> Learning | None:
        mark = self._marks.get(task.name)
        own = mark.learning if mark is not None else None
        if not self._policies_try:
            return own
        try:
            policy = self._ready_manager().policy_of(work)
        except Exception:  # noqa: BLE001 - whatever a plugin raises: it is told when the task is refused for it
            return own
        return Learning.of(policy, own)

    def _confine(self, task: Any, body: Body, args: Any, kwargs: Any, work: Work, lesson: Attempt) -> Any:
        admission = self._admit(task, work, lesson)
        if admission is None:
            return perform(task, body, args, kwargs)
        try:
            if isinstance(admission, ProcessAdmission):
                return remote_call.run(task, admission, args, kwargs, self)
            return here(task, body, admission, args, kwargs)
        finally:
            if admission.outcome is not None:
                self._ready_node().tally.add(admission.outcome)
                results.note(task, admission.outcome, events=self._ready_node().events)

    def _admit(self, task: Any, work: Work, lesson: Attempt) -> LocalAdmission | ProcessAdmission | None:
        for attempts_left in reversed(range(_ATTEMPTS)):
            manager = self._ready_manager()
            try:
                return _wait_for_budget(manager, work, lesson)
            except ConfinementError as error:
                if isinstance(error.__cause__, SoftTimeLimitExceeded):  # while it waited for its turn
                    raise error.__cause__ from None
                # It has not begun, so that it may begin again.
                if not manager.is_lost or not self._find_another_server(task):
                    raise
                if not attempts_left:
                    if task.acks_late:
                        raise ServerLost(str(error)) from None
                    raise
        raise AssertionError

    def _find_another_server(self, task: Any) -> bool:
        """False where this process cannot have another, and the task cannot go back to the queue."""
        if self._ready_node().pool.alone:
            _log.error("rcon: the fork server of this process is gone; it gets another")
            self.close()
            self._set_up(task)
            return True
        if task.acks_late:
            raise Reject("the fork server of this worker is gone", requeue=True)
        return False

    def _set_up(self, task: Any) -> None:
        """Get another fork server, or one at last where this process could not have one when it started.

        Where it cannot be had for some seconds, either, the task goes back to its queue if it is acknowledged late.
        Raises `Reject`, `ConfinementError`.
        """
        self._pulse.stop()  # no fork beside other threads
        for _ in range(_ATTEMPTS):
            if self._try_to_start():
                return
            time.sleep(_PAUSE)  # also so that it does not take the tasks of those that can
        if task.acks_late:
            raise Reject(f"this process cannot confine tasks: {self._fault}", requeue=True)

    def _ready_manager(self) -> Manager:
        if self.manager is None or self._pid != os.getpid():
            raise ConfinementError(f"this process cannot confine tasks: {self._fault}")
        return self.manager

    def _ready_node(self) -> Node:
        if self.node is None:
            raise ConfinementError("no worker runs here")
        return self.node


def _wait_for_budget(
    manager: Manager, work: Work, lesson: Attempt
) -> LocalAdmission | ProcessAdmission | None:
    """Admit a task; where it does not fit into the budget in time, it goes back to its queue, or waits if it cannot."""
    while True:
        try:
            return manager.admit(work, wait=True, memory=lesson.memory)
        except ConcurrencyLimitExceeded as error:
            if error.limit != BUDGET:
                raise
            back = lesson.back_to_the_queue(error)
            if back is not None:
                raise back from None


def _check_tries(task: str, mark: Mark, settings: Settings) -> None:
    """Raise `SettingsError` where what a task says of its deaths does not go with the policy that it names."""
    policy = settings.policies.get(mark.policy or "")
    if policy is None or mark.learning is None:
        return
    try:
        msgspec.structs.replace(policy, **mark.learning.said())
    except SettingsError as error:
        raise SettingsError(error.problem, key=f"@confined of {task}: {error.key}", hint=error.hint) from None


def _perform_as(request: Any, task: Any, body: Body, args: Any, kwargs: Any) -> Any:
    """Run a task's body in whatever thread this is: each has stacks of its own."""
    if task.request_stack.top is request:
        return perform(task, body, args, kwargs)
    _task_stack.push(task)
    task.request_stack.push(request)
    try:
        return perform(task, body, args, kwargs)
    finally:
        task.request_stack.pop()
        _task_stack.pop()


def here(task: Any, body: Body, admission: LocalAdmission, args: Any, kwargs: Any) -> Any:
    """Run a task's body in a thread of this process, where its policy says ``inline`` or ``thread``."""
    try:
        result = admission.call(_perform_as, task.request, task, body, args, kwargs)
    except BaseException as error:
        if not admission.ran and isinstance(error, RconError):
            admission.abort(str(error))
            raise
        ending: Literal["ok", "error"] = "ok" if isinstance(error, TaskPredicate) else "error"
        outcome = admission.finish(ending, codec.sentence(error))
        if outcome.ran_into_limit and isinstance(error, Exception):
            raise remote_call.raised(outcome) from error
        raise
    admission.finish("ok")
    return result
