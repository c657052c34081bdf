"""Log records and output of executor processes, logged by the host with its own handlers.

An executor process sends what its code logs as data over the pipe of its output: a line that begins with RS (RFC 7464)
and holds one record in JSON. The host decodes it, makes a record of its own, and passes it to its handlers, whatever
they are: console, file, JSON, a handler of a tracer. Every other line of the pipe is what code printed; the host logs
it with the logger that it chose for output.

What comes from an executor process may be forged. So it is data of a few types, bounded in size; the host alone says
which task or request a record belongs to, since when, and for which policy. Under a user of its own, each line of a
message begins with the policy and the key, and control characters are escaped. The bounds of `output` hold: bytes a
second for each confinement, and CPU time of the thread, `RECORDS_CPU_SHARE`, which includes that of the handlers.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import posix  # gevent replaces `os.write`
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

import msgspec

from rcon_plugins.executors.output import (
    LONGEST_LINE,
    ConfinementLog,
    Lines,
    OutputPipe,
    OutputReader,
    escape_unprintable,
    prefix_lines,
)

#: Begins a line that holds a record: "record separator", RFC 7464.
_SEPARATOR: Final = "\x1e"
#: The most of one record: characters of a message and of a traceback, bytes of its extra fields, bytes in all. The
#: reader of a pipe takes lines of up to 64 KiB.
_MOST_TEXT, _MOST_EXTRA, _MOST_BYTES = 16 * 1024, 16 * 1024, 60 * 1024
#: The most extra fields of a record, and the deepest nesting of their values.
_MOST_FIELDS, _MOST_NESTED = 64, 8
#: The longest name of a logger or a place in the code, characters.
_LONGEST_NAME: Final = 256
#: How many units of work an executor process may still log for, the last ones first.
_MOST_LABELS: Final = 64
#: The share of one CPU that the thread and the handlers may use, and how many seconds of CPU time they may save up.
RECORDS_CPU_SHARE: Final = 0.05
_CPU_BURST: Final = 0.25
#: Attributes of every record. Code cannot set them as extra fields.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_FIELD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")


class _Sent(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A record on its way to the host. ``via`` is the logger that the host has; ``work`` a number that it gave."""

    name: str
    via: str
    level: int
    message: str
    created: float
    data: dict[str, Any] | None = None
    text: str | None = None
    stack: str | None = None
    path: str = ""
    line: int = 0
    function: str | None = None
    thread: str | None = None
    method: str | None = None
    work: str = ""
    extra: dict[str, Any] | None = None


_encoder = msgspec.json.Encoder(enc_hook=str)
_decoder = msgspec.json.Decoder(_Sent)


class _Label(NamedTuple):
    """What the host knows of a unit of work: fields of its records, and the context of the thread that runs it."""

    fields: Mapping[str, str]
    context: contextvars.Context


class RecordLog:
    """The handlers of a server, as the log of its executor processes; pass it to `Deployment.start` as ``log``.

    Make it before the fork server is forked. ``output`` is the logger for what code prints, ``level`` the level of
    these records. ``loggers`` are all loggers that may have handlers.
    """

    def __init__(self, output: logging.Logger, level: int, loggers: Iterable[logging.Logger]) -> None:
        self.output = output
        self.level = level
        # Looked up and made here, because a new process has to copy each page of memory that it touches. The list keeps
        # removed handlers: an unreferenced file object would close its descriptor.
        self._handlers = [
            (logger, handler)
            for logger in loggers
            for handler in logger.handlers
            if not isinstance(handler, logging.NullHandler)
        ]
        self._sender = _Sender(self, min((handler.level for _, handler in self._handlers), default=0))
        #: The number of the unit of work under way, in an executor process.
        self.work = ""

    def __call__(self) -> AbstractContextManager[int]:
        """Give no descriptor: records go to handlers."""
        return contextlib.nullcontext(-1)

    def enter(self, descriptor: int) -> None:
        """Have all loggers send their records over this pipe. Call it in a new executor process."""
        self._sender.descriptor = descriptor
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
            logger.addHandler(self._sender)


class _Sender(logging.Handler):
    """The one handler of all loggers of an executor process. It writes each record to the pipe, once."""

    def __init__(self, log: RecordLog, level: int) -> None:
        super().__init__(level)
        #: The pipe; set in the executor process.
        self.descriptor = -1
        self._log = log
        self._known = frozenset(logging.Logger.manager.loggerDict)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record. Wait while the host does not read."""
        if "rcon_sent" in vars(record):  # another logger on its way has sent it
            return
        vars(record)["rcon_sent"] = True
        try:
            left = memoryview(self._encoded(record))
            while left:
                left = left[posix.write(self.descriptor, left) :]
        except Exception:  # noqa: BLE001 - as each handler: arguments that do not fit, a pipe that is gone
            self.handleError(record)

    def _encoded(self, record: logging.LogRecord) -> bytes:
        values = vars(record)
        text = record.exc_text
        if record.exc_info and not text:
            text = logging.Formatter().formatException(record.exc_info)
        sent = _Sent(
            record.name,
            self._via(record.name),
            record.levelno,
            _shortened(record.getMessage()),
            record.created,
            # A formatter of structlog or of JSON takes a message that is a mapping.
            data=record.msg if isinstance(record.msg, dict) else None,
            text=text and _shortened(text),
            stack=record.stack_info and _shortened(record.stack_info),
            path=record.pathname,
            line=record.lineno,
            function=record.funcName,
            thread=record.threadName,
            method=values.get("_name"),  # of structlog
            work=self._log.work,
            extra={
                name: value for name, value in values.items() if name not in _OWN and _FIELD.fullmatch(name)
            },
        )
        if sent.extra is not None:
            sent.extra.pop("rcon_sent", None)
        sent.extra = _within(sent.extra or None, _MOST_EXTRA)
        sent.data = _within(sent.data, _MOST_EXTRA)
        data = _line(sent)
        if len(data) > _MOST_BYTES:
            sent.extra = sent.data = None
            shorter = _MOST_TEXT // 8  # a character takes six bytes at most
            sent.message, sent.text = sent.message[:shorter], sent.text and sent.text[:shorter]
            sent.stack = sent.stack and sent.stack[:shorter]
            data = _line(sent)
        return data

    def _via(self, name: str) -> str:
        """Return the first logger, from this one towards the root, that the host has, too."""
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None and logger.parent is not None:
            if logger.name in self._known:
                return logger.name
            logger = logger.parent
        return ""


def _line(sent: _Sent) -> bytes:
    return _SEPARATOR.encode() + _encoder.encode(sent) + b"\n"


def _within(value: dict[str, Any] | None, most: int) -> dict[str, Any] | None:
    """Return the mapping with text for keys; None if it cannot be encoded, or takes more than so many bytes."""
    if value is None:
        return None
    with contextlib.suppress(Exception):  # objects of the application, and circles
        value = {str(name): each for name, each in value.items()}
        if len(_encoder.encode(value)) <= most:
            return value
    return None


def _shortened(text: str) -> str:
    """Return the text in a form that UTF-8 can encode. Cut out the middle of a long text."""
    if len(text) > _MOST_TEXT:
        text = f"{text[: _MOST_TEXT // 2]}\n[...]\n{text[-_MOST_TEXT // 2 :]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class RecordPipe(OutputPipe):
    """The pipe of one executor process whose records the host logs."""

    __slots__ = ("_labels", "_last", "_records", "opened", "own_user")

    def __init__(self, log: ConfinementRecords, *, own_user: bool) -> None:
        super().__init__(log)
        self._records = log
        #: Whether the code runs as a user of its own, who must not be able to forge the lines of others.
        self.own_user = own_user
        self.opened = time.time()
        self._labels: OrderedDict[str, _Label] = OrderedDict()
        self._last: _Label | None = None

    def label(self, number: str, fields: Mapping[str, str]) -> None:
        """Have records of the unit of work with this number carry these fields, in the caller's context."""
        self._last = self._labels[number] = _Label(dict(fields), contextvars.copy_context())
        while len(self._labels) > _MOST_LABELS:
            self._labels.popitem(last=False)

    def label_of(self, number: str | None) -> _Label | None:
        """Return what the host knows of a unit of work; of the last one for None."""
        return self._last if number is None else self._labels.get(number)

    def take(self, data: bytes, *, heard: bool, beyond: int = 0) -> list[Lines]:  # noqa: ARG002 - always
        """Return the records in ``data``, which ends with a line end, ready to be logged."""
        return self._records.take_records(self, data, beyond=beyond)


class _Record(Lines):
    """One record to log."""

    __slots__ = ("label", "record", "via")

    def __init__(
        self, log: ConfinementRecords, record: logging.LogRecord, via: logging.Logger, label: _Label | None
    ) -> None:
        super().__init__(log, b"", 1)
        self.record = record
        self.via = via
        self.label = label


class ConfinementRecords(ConfinementLog):
    """What one confinement logs, as records."""

    def __init__(self, policy: str, key: str | None, target: RecordLog) -> None:
        super().__init__(policy, key)
        self._fields = {"rcon_policy": policy, **({} if key is None else {"rcon_key": key})}
        self._target = target

    def take_records(self, pipe: RecordPipe, data: bytes, *, beyond: int) -> list[Lines]:
        """Return the records in ``data``. Drop those past the meter, which may be passed by ``beyond`` bytes."""
        self.refill()
        if self.is_full and not beyond:
            self.dropped += data.count(b"\n")
            return []
        most, size = self.left + beyond, 0
        found: list[Lines] = []
        lines = data.decode("utf-8", "backslashreplace").split("\n")[:-1]
        for number, line in enumerate(lines):
            sent = _decoded(line)
            cost = len(line) if sent is None else _cost(sent)
            if size + cost > most:
                self.dropped += len(lines) - number
                self.is_full = True
                break
            size += cost
            if sent is not None:
                found.append(self._record_of(pipe, sent))
            else:
                found += [self._printed(pipe, piece) for piece in _pieces(line.removesuffix("\r"))]
        self.left -= size
        if self.left < 0:
            self.is_full = True
        return found

    def take_notice(self) -> list[Lines]:
        """Return the record that says how many lines were dropped; none if there is nothing to say."""
        if not self.dropped:
            return []
        text = f"{self.prefix}… {self.dropped:,} line{'s' * (self.dropped != 1)} dropped"
        self.dropped = 0
        target = self._target
        record = _made(target.output.name, target.level, text)
        return [_Record(self, record, target.output, None)]

    def _printed(self, pipe: RecordPipe, line: str) -> _Record:
        target, label = self._target, pipe.label_of(None)
        text = f"{self.prefix}{escape_unprintable(line)}" if pipe.own_user else line
        record = _made(target.output.name, target.level, text)
        self._complete(record, label)
        return _Record(self, record, target.output, label)

    def _record_of(self, pipe: RecordPipe, sent: _Sent) -> _Record:
        own = pipe.own_user
        record = _made(_name(sent.name), max(0, min(sent.level, 100)), self._message(pipe, sent))
        record.pathname, record.lineno = _name(sent.path, 1024), sent.line
        record.filename = record.pathname.rpartition("/")[2]
        record.module = record.filename.rpartition(".")[0] or record.filename
        if sent.function is not None:
            record.funcName = _name(sent.function)
        if sent.thread is not None:
            record.threadName = _name(sent.thread)
        record.exc_text = (
            prefix_lines(sent.text, self.prefix).rstrip("\n") if own and sent.text else sent.text
        )
        record.stack_info = (
            prefix_lines(sent.stack, self.prefix).rstrip("\n") if own and sent.stack else sent.stack
        )
        record.created = min(max(sent.created, pipe.opened), time.time())
        record.msecs = int(record.created % 1 * 1000) + 0.0
        if sent.method is not None:  # what the formatter of structlog looks at
            vars(record).update(_name=_name(sent.method), _logger=None)
        for name, value in list((sent.extra or {}).items())[:_MOST_FIELDS]:
            if name not in _OWN and _FIELD.fullmatch(name):
                vars(record)[name] = _clean(value) if own else value
        label = pipe.label_of(sent.work)
        self._complete(record, label)
        return _Record(self, record, _existing(sent.via), label)

    def _message(self, pipe: RecordPipe, sent: _Sent) -> str | dict[str, Any]:
        if not pipe.own_user:
            return sent.message if sent.data is None else sent.data
        if sent.data is not None:
            data: dict[str, Any] = _clean(sent.data)
            return data
        first, *others = sent.message.splitlines() or [""]
        further = prefix_lines("\n".join(others), self.prefix).rstrip("\n")
        return "\n".join([f"{self.prefix}{escape_unprintable(first)}", *([further] if further else [])])

    def _complete(self, record: logging.LogRecord, label: _Label | None) -> None:
        """Set what the host alone says of a record."""
        vars(record).update(self._fields)
        if label is not None:
            vars(record).update(label.fields)


class RecordReader(OutputReader):
    """The thread of the host that reads the pipes of all executor processes and logs with the host's handlers."""

    cpu_share, cpu_burst = RECORDS_CPU_SHARE, _CPU_BURST

    def __init__(self, target: RecordLog) -> None:
        super().__init__(target)
        self._target = target

    def _new_log(self, policy: str, key: str | None) -> ConfinementRecords:
        return ConfinementRecords(policy, key, self._target)

    def _new_pipe(self, log: ConfinementLog, *, own_user: bool) -> OutputPipe:
        if not isinstance(log, ConfinementRecords):
            raise TypeError(f"{type(log).__name__} logs no records")
        return RecordPipe(log, own_user=own_user)

    def _is_heard(self, descriptor: int, *, last: bool) -> bool | None:  # noqa: ARG002 - handlers wait or drop
        return True

    def _write(self, descriptor: int, lines: list[Lines]) -> None:  # noqa: ARG002 - as above
        for one in lines:
            if isinstance(one, _Record):
                _log(one)


def _log(one: _Record) -> None:
    """Pass a record to the handlers of its logger, and of those above it, in the context of its work."""
    call: Callable[..., Any] = one.label.context.run if one.label is not None else _call
    logger: logging.Logger | None = one.via
    found = False
    while logger is not None:
        for handler in logger.handlers:
            found = True
            if one.record.levelno >= handler.level:
                try:
                    call(handler.handle, one.record)
                except Exception:  # noqa: BLE001 - a handler of the application; the others get the record
                    handler.handleError(one.record)
        logger = logger.parent if logger.propagate else None
    if (
        not found and one.record.levelno >= logging.WARNING
    ):  # as `logging.lastResort`; sys.stderr may be a logger
        with contextlib.suppress(OSError):
            posix.write(2, f"{one.record.getMessage()}\n".encode(errors="backslashreplace"))


def _call(function: Callable[[Any], Any], argument: object) -> None:
    function(argument)


def _decoded(line: str) -> _Sent | None:
    """Return the record that a line holds; None if it holds none."""
    if not line.startswith(_SEPARATOR):
        return None
    try:
        sent = _decoder.decode(line[1:])
        if _depth(sent.extra) > _MOST_NESTED or _depth(sent.data) > _MOST_NESTED:
            sent.extra = sent.data = None
    except (msgspec.MsgspecError, RecursionError):
        return None
    return sent


def _depth(value: object) -> int:
    """Return how deep lists and mappings are nested, as far as that matters."""
    level, depth = [value], 0
    while level and depth <= _MOST_NESTED:
        level = [
            each
            for one in level
            if isinstance(one, list | dict)
            for each in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
    return depth


def _cost(sent: _Sent) -> int:
    """Return how many bytes of the log a record takes, about."""
    found = len(sent.name) + len(sent.message) + len(sent.text or "") + len(sent.stack or "")
    return found + sum(len(str(each)) for each in (sent.extra, sent.data) if each)


def _made(name: str, level: int, message: object) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, message, (), None)


def _existing(name: str) -> logging.Logger:
    """Return a logger of this process. An executor process cannot make it create one."""
    found = logging.Logger.manager.loggerDict.get(name)
    return found if isinstance(found, logging.Logger) else logging.getLogger()


def _name(text: str, most: int = _LONGEST_NAME) -> str:
    return escape_unprintable(text[:most])


def _clean(value: Any) -> Any:
    """Return data with all control characters escaped."""
    if isinstance(value, str):
        return escape_unprintable(value)
    if isinstance(value, dict):
        return {escape_unprintable(name): _clean(each) for name, each in value.items()}
    return [_clean(each) for each in value] if isinstance(value, list) else value


def _pieces(line: str) -> Iterator[str]:
    """Return a line that was printed, in pieces that are not too long."""
    for start in range(0, max(1, len(line)), LONGEST_LINE):
        yield line[start : start + LONGEST_LINE]
