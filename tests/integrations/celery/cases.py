"""What a producer does with the application's tasks, and all that can be seen of it: `play`.

Each case is a function that sends tasks, under ids it makes up, and says what must come of them. It is played against a
worker that confines and one that does not; `play` gathers, for each task that was sent, what the result backend holds
and what the worker wrote down. Both have to be the same.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import celery
import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult

from tests.integrations.celery.application import OutOfPaper, Point, Records
from tests.processes import until

#: No result within so many seconds is a hang.
PATIENCE = 60.0

#: What the result backend holds of a task; not when it was done.
KEPT = (
    *("status", "name", "args", "kwargs", "retries", "queue", "worker", "parent_id", "children", "result"),
    "traceback",
)

POOLS = ("prefork", "threads", "solo")


class Case(NamedTuple):
    """One case, the pools and the serializer that it is played with."""

    name: str
    function: Callable[[Producer], object]
    pools: tuple[str, ...]
    serializer: str


class History(NamedTuple):
    """The outcome of one case."""

    #: What is wrong already with what came back, whatever it is compared with.
    fault: str | None
    answer: object
    #: By id: what the result backend holds, and what was written down.
    tasks: dict[str, dict[str, Any]]


CASES: dict[str, Case] = {}


def case(*, pools: tuple[str, ...] = POOLS, serializer: str = "json") -> Callable[[Any], Any]:
    def add(function: Callable[[Producer], object]) -> Callable[[Producer], object]:
        CASES[function.__name__] = Case(function.__name__, function, pools, serializer)
        return function

    return add


class Producer:
    """Sends the tasks of one case."""

    def __init__(self, app: celery.Celery, records: Records, name: str, directory: Path) -> None:
        self.app = app
        self.records = records
        self.name = name
        self.directory = directory
        self.ids: list[str] = []

    def id(self, suffix: str = "") -> str:
        """Return a new id, the same in each world."""
        made = f"{self.name}-{len(self.ids)}{suffix}"
        self.ids.append(made)
        return made

    def task(self, name: str) -> Any:
        return self.app.tasks[name]

    def signature(self, name: str, *args: Any, immutable: bool = False, **options: Any) -> Any:
        return self.task(name).signature(args, immutable=immutable).set(task_id=self.id(), **options)

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        sent: AsyncResult[Any] = self.task(name).apply_async(
            args, options.pop("kwargs", None), task_id=self.id(), **options
        )
        return sent

    def get(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task; return its result or raise its exception."""
        return self.send(name, *args, **options).get(timeout=PATIENCE)

    def wait_for(self, task_id: str, what: str) -> None:
        """Wait until the worker wrote this record of a task."""
        until(lambda: any(record[0] == what for record in self.records.read(task_id)))

    def gate(self) -> Path:
        """Return the path of a file that does not exist yet."""
        path = self.directory / self.name
        path.unlink(missing_ok=True)
        return path

    def now_running(self, result: AsyncResult[Any]) -> None:
        for record in ("prerun", "before_start"):  # the handlers before the body; either is the last
            self.wait_for(result.id, record)


def play(cases: list[Case], app: celery.Celery, records: Records, directory: Path) -> dict[str, Any]:
    """Play the cases one after the other; return what `tell` makes their histories of."""
    played: dict[str, Any] = {}
    for each in cases:
        producer = Producer(app, records, each.name, directory)
        fault, answer = None, None
        try:
            answer = each.function(producer)
        except Exception:
            fault = traceback.format_exc()
        played[each.name] = (producer, fault, answer)
    return played


def tell(played: dict[str, Any]) -> dict[str, History]:
    """Return the histories, once the worker ended."""
    return {
        name: History(
            fault,
            plain(answer),
            {task_id: remains(producer.app, producer.records, task_id) for task_id in producer.ids},
        )
        for name, (producer, fault, answer) in played.items()
    }


def remains(app: celery.Celery, records: Records, task_id: str) -> dict[str, Any]:
    """Return all that can be seen of a task."""
    meta = app.backend.get_task_meta(task_id)
    found = {key: plain(meta.get(key)) for key in KEPT}
    if meta.get("traceback"):
        found["traceback"] = plain(meta["traceback"].strip().splitlines()[-1])
    return {**found, "records": plain(records.read(task_id))}


def plain(value: Any) -> Any:
    """Return a value without what differs in each world: addresses, generated ids, times."""
    match value:
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case BaseException():
            return [type(value).__module__, type(value).__qualname__, plain(value.args)]
        case AsyncResult():
            return plain(value.as_tuple())
        case str():
            text = re.sub(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "UUID", value)
            return re.sub(r"\b0x[0-9a-f]+\b", "0x", text)
        case float() if value > 1e9:
            return "a time"
        case None | bool() | int() | float():
            return value
        case _:
            return plain(repr(value))


def failure(result: AsyncResult[Any]) -> BaseException:
    """Return the exception of a task, as the producer gets it."""
    error = result.get(timeout=PATIENCE, propagate=False)
    assert isinstance(error, BaseException)
    return error


# --- arguments and results ------------------------------------------------------------------------------------


@case()
def returning(producer: Producer) -> object:
    assert producer.get("add", 1, 2) == 3
    return producer.get("echo", 1, None, True, 2.5, "ü", [1, [2]], kwargs={"a": {"b": []}})


@case()
def large(producer: Producer) -> None:
    text = "x" * 3_000_000
    assert producer.get("add", text, "y") == text + "y"


@case()
def wrong_arguments(producer: Producer) -> None:
    """They reach the worker, since this producer knows the task by name only."""
    sent = producer.app.send_task("add", (1,), task_id=producer.id())
    assert isinstance(failure(sent), TypeError)


@case()
def wrong_arguments_here(producer: Producer) -> None:
    """This producer has the task's code, and sends nothing that cannot be called."""
    with pytest.raises(TypeError):
        producer.task("add").delay(1)


@case()
def custom_serializer(producer: Producer) -> object:
    return producer.get("rot13", "hello")


@case()
def another_serializer_for_this_call(producer: Producer) -> object:
    return producer.get("add", "a", "b", serializer="rot13")


@case()
def what_only_another_serializer_carries(producer: Producer) -> None:
    for what in ({1: "one"}, (1, 2), [b"bytes"]):
        assert producer.get("spelled", what, serializer="literal") == repr(what)


@case(serializer="pickle")
def pickled(producer: Producer) -> None:
    point, numbers = producer.get("pointed", Point(1, 2), {3, 1, 2})
    assert (point, numbers) == (Point(2, 1), [1, 2, 3])
    assert isinstance(point, Point)


@case(serializer="pickle")
def pickled_exception(producer: Producer) -> object:
    error = failure(producer.send("raising", "own"))
    assert isinstance(error, OutOfPaper)
    return [error.printer, error.pages]


@case(serializer="pickle")
def pickled_exception_that_does_not(producer: Producer) -> object:
    return failure(producer.send("raising", "stubborn"))


@case()
def unserializable_result(producer: Producer) -> object:
    return type(failure(producer.send("unserializable"))).__name__


@case()
def unspeakable_result(producer: Producer) -> object:
    return type(failure(producer.send("unserializable", "number"))).__name__


# --- what a task sees -----------------------------------------------------------------------------------------


@case()
def bound(producer: Producer) -> object:
    seen = producer.get(
        "request", 1, kwargs={"two": 2}, headers={"tenant": "anna"}, shadow="nickname", priority=3
    )
    assert seen["args"] == [1]
    assert seen["kwargs"] == {"two": 2}
    assert seen["tenant"] == "anna"
    assert seen["id"] == seen["root_id"] == producer.ids[0]
    return seen


@case()
def class_of_a_task(producer: Producer) -> object:
    return producer.get("instance")


@case()
def called(producer: Producer) -> None:
    assert producer.get("called", "you") == ["hello", "you"]


@case()
def speaking(producer: Producer) -> None:
    producer.get("speaking")


# --- how it ends ----------------------------------------------------------------------------------------------


@case()
def exceptions(producer: Producer) -> object:
    return [failure(producer.send("raising", kind)) for kind in ("plain", "cause", "unicode")]


@case()
def exception_that_cannot_be_made_again(producer: Producer) -> object:
    return failure(producer.send("raising", "stubborn"))


@case()
def group_of_exceptions(producer: Producer) -> object:
    return failure(producer.send("raising", "group"))


@case()
def own_exception(producer: Producer) -> None:
    error = failure(producer.send("raising", "own"))
    assert isinstance(error, OutOfPaper)
    assert error.args == ("laser", 3)


@case()
def expected_exception(producer: Producer) -> None:
    assert isinstance(failure(producer.send("throwing")), KeyError)


@case()
def ignored(producer: Producer) -> None:
    result = producer.send("ignoring")
    producer.wait_for(result.id, "postrun")
    assert result.state == "SKIPPED"
    assert result.info == {"why": "nothing to do"}


@case()
def rejected(producer: Producer) -> None:
    result = producer.send("rejecting", False)
    producer.wait_for(result.id, "failure")  # so Celery's worker says of a task that it rejected
    until(lambda: result.state == "FAILURE")


@case()
def rejected_and_put_back(producer: Producer) -> None:
    assert producer.get("rejecting", True) == "redelivered"


@case()
def acknowledged_late(producer: Producer) -> None:
    assert producer.get("late") == "late"


@case()
def without_result(producer: Producer) -> None:
    results = [producer.send("without_result"), producer.send("late", ignore_result=True)]
    for result in results:
        producer.wait_for(result.id, "postrun")
        assert result.state == "PENDING"


@case()
def update_state(producer: Producer) -> None:
    gate = producer.gate()
    result = producer.send("progress", str(gate))
    until(lambda: result.state == "PROGRESS")
    assert result.info == {"done": 1, "of": 2}
    gate.touch()
    assert result.get(timeout=PATIENCE) == "done"


@case()
def track_started(producer: Producer) -> object:
    gate = producer.gate()
    result = producer.send("started", str(gate))
    until(lambda: result.state == "STARTED")
    info = result.info
    gate.touch()
    assert result.get(timeout=PATIENCE) == "done"
    return sorted(info)


# --- again ----------------------------------------------------------------------------------------------------


@case()
def retry(producer: Producer) -> None:
    assert producer.get("retrying", 2) == [2, 2]


@case()
def retry_in_vain(producer: Producer) -> object:
    own, plain_ = (failure(producer.send("retrying_in_vain", kind)) for kind in ("own", "plain"))
    assert isinstance(own, OutOfPaper)
    return [own, plain_]


@case()
def autoretry(producer: Producer) -> None:
    assert producer.get("auto", 2) == 2
    assert isinstance(failure(producer.send("auto_in_vain")), OutOfPaper)


# --- several --------------------------------------------------------------------------------------------------


@case()
def chains(producer: Producer) -> None:
    first = producer.signature("add", 1, 2)
    last = chain(first, producer.signature("add", 10), producer.signature("add", 100))
    assert last.apply_async().get(timeout=PATIENCE) == 113


@case()
def chain_that_breaks(producer: Producer) -> None:
    broken = chain(producer.signature("raising", "own"), producer.signature("add", 1)).apply_async()
    with pytest.raises(OutOfPaper):
        broken.get(timeout=PATIENCE)


@case()
def groups(producer: Producer) -> None:
    members = group(producer.signature("add", number, number) for number in range(6))
    assert members.apply_async().get(timeout=PATIENCE) == [0, 2, 4, 6, 8, 10]


@case()
def chords(producer: Producer) -> None:
    members = [producer.signature("add", number, number) for number in range(6)]
    assert chord(members)(producer.signature("total")).get(timeout=PATIENCE) == 30


@case()
def chord_that_breaks(producer: Producer) -> None:
    members = [producer.signature("add", 1, 2), producer.signature("raising", "own")]
    body = producer.signature("total")
    # By its id alone: the result of the chord itself would raise whichever of the two errors it hears of first.
    chord(members)(body)
    error = failure(AsyncResult(body.options["task_id"], app=producer.app))
    assert isinstance(error, ChordError)
    assert "OutOfPaper" in str(error)


@case()
def chain_of_chords(producer: Producer) -> None:
    members = [producer.signature("add", number, 1) for number in range(3)]
    whole = chain(group(members), producer.signature("total"), producer.signature("add", 1000))
    assert whole.apply_async().get(timeout=PATIENCE) == 1006


@case()
def links(producer: Producer) -> None:
    linked = producer.signature("add", 10)
    assert producer.get("add", 1, 2, link=linked) == 3
    assert AsyncResult(linked.options["task_id"], app=producer.app).get(timeout=PATIENCE) == 13


@case()
def error_links(producer: Producer) -> None:
    closely = producer.task("listen_closely").s()
    result = producer.send("raising", "own", link_error=closely)
    assert isinstance(failure(result), OutOfPaper)
    producer.wait_for(result.id, "errback")


@case()
def error_link_of_a_chain(producer: Producer) -> None:
    closely = producer.task("listen_closely").s()
    whole = chain(producer.signature("raising", "own"), producer.signature("add", 1)).on_error(closely)
    with pytest.raises(OutOfPaper):
        whole.apply_async().get(timeout=PATIENCE)
    producer.wait_for(producer.ids[0], "errback")


@case()
def error_link_by_id(producer: Producer) -> None:
    by_id = producer.signature("listen")
    result = producer.send("raising", "own", link_error=by_id)
    assert isinstance(failure(result), OutOfPaper)
    producer.wait_for(result.id, "errback by id")
    until(lambda: AsyncResult(by_id.options["task_id"], app=producer.app).successful())


@case()
def replace(producer: Producer) -> None:
    assert producer.get("replacing", 1) == 101


@case()
def a_task_that_sends_a_task(producer: Producer) -> object:
    result = producer.send("calling", 5)
    child = result.get(timeout=PATIENCE)
    producer.ids.append(child)
    seen = AsyncResult(child, app=producer.app).get(timeout=PATIENCE)
    assert seen["parent_id"] == seen["root_id"] == result.id
    return [seen, [each.id for each in result.children or ()]]


# --- when -----------------------------------------------------------------------------------------------------


@case()
def eta(producer: Producer) -> None:
    due = time.time() + 0.5
    at = datetime.fromtimestamp(due, UTC)
    assert producer.get("clock", eta=at) >= due
    due = time.time() + 0.3
    assert producer.get("clock", countdown=0.3) >= due


@case()
def rate_limits(producer: Producer) -> None:
    """Five a second: from the first to the fourth take three fifths of one."""
    producer.get("limited")  # prepare first: the process that the others run in is there then
    results = [producer.send("limited") for _ in range(4)]
    times = sorted(result.get(timeout=PATIENCE) for result in results)
    assert times[-1] - times[0] > 0.4


@case()
def expired(producer: Producer) -> None:
    result = producer.send("add", 1, 2, expires=datetime.now(UTC) - timedelta(seconds=10))
    assert isinstance(failure(result), TaskRevokedError)
    assert result.state == "REVOKED"


@case()
def revoked(producer: Producer) -> None:
    result = producer.send("wait", 0, countdown=1)
    producer.app.control.revoke(result.id, reply=True, timeout=PATIENCE, limit=1)
    assert isinstance(failure(result), TaskRevokedError)
    producer.wait_for(result.id, "revoked")  # when its time has come


# --- Celery's own limits; these end a child of the pool ------------------------------------------------------


@case(pools=("prefork",))
def soft_time_limit(producer: Producer) -> None:
    assert producer.get("soft") == "cleaned up"


@case(pools=("prefork",))
def time_limit(producer: Producer) -> None:
    result = producer.send("too_long")
    assert isinstance(failure(result), TimeLimitExceeded)
    producer.wait_for(result.id, "failure")


@case(pools=("prefork",))
def revoked_while_it_runs(producer: Producer) -> None:
    result = producer.send("wait", 60)
    producer.now_running(result)
    result.revoke(terminate=True)
    assert isinstance(failure(result), TaskRevokedError)
    producer.wait_for(result.id, "revoked")


@case(pools=("prefork",))
def after_all_that(producer: Producer) -> None:
    assert [producer.get("add", number, 1) for number in range(8)] == list(range(1, 9))
