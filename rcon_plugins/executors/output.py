"""The standard output and error of executor processes with a user of their own: one pipe each, which the host reads.

The host writes what it reads to its own log, line by line. Each line begins with the policy and the key, which the
executor cannot forge. Three bounds hold, whatever the code writes:

- The lines of one confinement (policy and key) take `RATE` bytes of the log a second, after a burst of `BURST`. Lines
  beyond that are read, dropped and counted, so that honest code goes on. The last lines of an executor are logged.
- The thread that reads uses `CPU_SHARE` of one CPU. When it has used that, it pauses. Pipes then fill up, and their
  writers wait.
- The host waits at most `PATIENCE` for its own log. Then lines are dropped and counted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import posix  # gevent replaces `os.close`
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Final
from urllib.parse import quote

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors, threads
from rcon_plugins.kernel.attempts import FIRST_PAUSE, Attempts
from rcon_plugins.kernel.syscalls import POLLOUT, poll

LOGGER = logging.getLogger("rcon")

#: Bytes of the log that the lines of one confinement may take: a second, and at once.
RATE: Final = 32 * 1024
BURST: Final = 256 * 1024
#: The share of one CPU that the thread may use, and how many seconds of CPU time it may save up.
CPU_SHARE: Final = 0.003
_CPU_BURST: Final = 0.02
#: After how many seconds of CPU time it pauses, even if other pipes can be read.
_ROUND: Final = 0.003
#: Characters that take long to escape count as so many bytes of the log. Not measured: a slow machine must not drop
#: lines that a fast one would log.
_ESCAPE_COST: Final = 4
#: What it costs to wait for the pipes and to wake up, seconds of CPU time. It is not measured.
_WAKE_UP: Final = 50e-6
#: The shortest and the longest pause after reading, seconds.
_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 5.0
#: How long to wait for a log that takes nothing, seconds.
PATIENCE: Final = 1.0
#: The same when it took something just before. Under gevent all requests of the process wait.
_SHORT_PATIENCE: Final = 0.1
#: How long `close` waits for the thread, seconds.
_CLOSE_SECONDS: Final = 5.0
#: How much is read at once, and how often from one pipe before the others.
_CHUNK: Final = 64 * 1024
_READS: Final = 8
#: How often to read the pipe of an executor that has ended: all of the largest pipe of an unprivileged user, pipe(7).
_LAST_READS: Final = 17
#: How much of its last lines is logged even beyond the meter, bytes.
_LAST_WORDS: Final = 2048
#: Longer lines are split, bytes. With prefix and escapes a line may take a few times as much.
LONGEST_LINE: Final = 2048
#: What one write(2) takes from a pipe that poll(2) reports as writable without waiting: PIPE_BUF, pipe(7).
_ATOMIC: Final = 4096
_KEY_CHARACTERS: Final = 100

#: Gives the descriptor of the server's log, which stays open in the ``with`` block.
Log = Callable[[], AbstractContextManager[int]]


def standard_error() -> AbstractContextManager[int]:
    """Give the server's standard error as its log."""
    return contextlib.nullcontext(2)


def log_of(loggers: Iterable[logging.Logger]) -> Log:
    """Return the log of a server: the first open file that the loggers write to, else its standard error."""
    return partial(_first_file, tuple(loggers))


@contextlib.contextmanager
def _first_file(loggers: tuple[logging.Logger, ...]) -> Iterator[int]:
    for handler in (one for logger in loggers for one in logger.handlers):
        if not isinstance(handler, logging.FileHandler):
            continue
        with contextlib.ExitStack() as locked:
            handler.acquire()  # otherwise the file may be opened again meanwhile, for log rotation
            locked.callback(handler.release)
            reopen = getattr(handler, "reopenIfNeeded", None)
            if reopen is not None:
                with contextlib.suppress(OSError):
                    reopen()
            if handler.stream is not None and not handler.stream.closed:
                yield handler.stream.fileno()
                return
    yield 2


class OutputPipe:
    """The pipe of one executor process.

    The thread that opened it passes the writer on and closes it. No other thread does, since an executor may end
    meanwhile: the descriptor could be that of another file when it is passed on or closed a second time.
    """

    __slots__ = ("_rest", "ended", "log", "reader", "writer")

    def __init__(self, log: ConfinementLog) -> None:
        self.reader, self.writer = descriptors.pipe()
        try:
            os.set_blocking(self.reader, False)
        except OSError as error:
            posix.close(self.reader)
            posix.close(self.writer)
            raise KernelError.from_oserror(error, path="a pipe for the output") from None
        self.log = log
        #: The beginning of a line whose end has not been written yet.
        self._rest = b""
        #: Whether the executor and everything that it started has ended.
        self.ended = False

    def close_writer(self) -> None:
        """Close the end that the executor writes to, in this process."""
        if self.writer >= 0:
            posix.close(self.writer)
            self.writer = -1

    def read(self, reads: int, *, heard: bool) -> tuple[list[Lines], bool]:
        """Read what there is. Return the lines to log, and whether nothing will come any more.

        Unless ``heard``, drop and count all lines: the log does not take them.
        """
        found: list[Lines] = []
        for _ in range(reads):
            try:
                data = posix.read(self.reader, _CHUNK)
            except BlockingIOError:
                return found, False
            except InterruptedError:
                continue
            except OSError:
                return found, True
            if not data:
                return found, True
            found += self._take(data, heard=heard)
            if len(data) < _CHUNK or self.log.is_full:
                break
        return found, False

    def read_last(self, *, heard: bool) -> list[Lines]:
        """Read all that is left, and close the pipe. Return the lines to log."""
        data = self._rest
        with contextlib.suppress(OSError):
            for _ in range(_LAST_READS):
                piece = posix.read(self.reader, _CHUNK)
                if not piece:
                    break
                data += piece
        posix.close(self.reader)
        self.ended = True
        if not data:
            return []
        if not data.endswith(b"\n"):
            data += b"\n"
        words = data.rfind(b"\n", 0, max(0, len(data) - _LAST_WORDS)) + 1
        lines = self.take(data[:words], heard=heard) if words else []
        return lines + self.take(data[words:], heard=heard, beyond=BURST)

    def take(self, data: bytes, *, heard: bool, beyond: int = 0) -> list[Lines]:
        """Return the lines of ``data``, which ends with a line end: see `ConfinementLog.take`."""
        return self.log.take(data, heard=heard, beyond=beyond)

    def _take(self, data: bytes, *, heard: bool) -> list[Lines]:
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        lines = self.take(data[:end], heard=heard) if end else []
        self._rest = data[end:]
        if len(self._rest) >= _CHUNK:  # a line that may never end
            end = _end_of_characters(self._rest)
            lines += self.take(self._rest[:end] + b"\n", heard=heard)
            self._rest = self._rest[end:]
        return lines


class Lines:
    """Whole lines to write, and the confinement that they are of."""

    __slots__ = ("count", "log", "text")

    def __init__(self, log: ConfinementLog, text: bytes, count: int) -> None:
        self.log = log
        self.text = text
        self.count = count


class ConfinementLog:
    """What one confinement logs: the prefix, the meter, and the number of dropped lines."""

    def __init__(self, policy: str, key: str | None) -> None:
        self.prefix = log_prefix(policy, key)
        #: The number of open pipes.
        self.pipes = 0
        self.dropped = 0
        self.left = float(BURST)
        self._since = time.monotonic()
        #: Whether the meter was exceeded. It takes lines again when it can take those of a second.
        self.is_full = False

    @property
    def used(self) -> float:
        """How much of the meter is used. Those that log least are read first, so that no flood keeps them waiting."""
        self.refill()
        return BURST - self.left

    def refill(self) -> None:
        """Add what the time since the last call is worth."""
        now = time.monotonic()
        self.left = min(BURST, self.left + (now - self._since) * RATE)
        self._since = now
        if self.left >= RATE:
            self.is_full = False

    @property
    def is_idle(self) -> bool:
        """Whether it can be forgotten: a new one would be the same. For any thread."""
        idle = not self.pipes and not self.dropped
        return idle and self.left + (time.monotonic() - self._since) * RATE >= BURST

    def take(self, data: bytes, *, heard: bool, beyond: int = 0) -> list[Lines]:
        """Return the lines of ``data``, which ends with a line end, ready to be logged. Drop those past the meter.

        Go past the meter by ``beyond`` bytes at most.
        """
        self.refill()
        if not heard or (self.is_full and not beyond):
            self.dropped += data.count(b"\n")
            return []
        most = self.left + beyond
        # Decode no more than can be logged: a line takes at least its own length.
        longest = max(0, int(most)) + LONGEST_LINE
        taken = data if len(data) <= longest else data[: data.rfind(b"\n", 0, longest) + 1]
        texts: list[str] = []
        size = count = 0
        for piece, last in _pieces(taken):
            shown = escape_unprintable(piece)
            text = f"{self.prefix}{shown}{'' if last else '…'}\n"
            cost = len(text) + (
                0 if shown is piece else len(piece) * (1 if piece.isascii() else _ESCAPE_COST)
            )
            if size + cost > most:
                break
            size += cost
            texts.append(text)
            count += last
        self.left -= size
        dropped = data.count(b"\n") - count
        if dropped or self.left < 0:
            self.is_full = True
            self.dropped += dropped
        return [Lines(self, "".join(texts).encode(), count)] if texts else []

    def take_notice(self) -> list[Lines]:
        """Return the line that says how many lines were dropped; none if there is nothing to say."""
        if not self.dropped:
            return []
        text = f"{self.prefix}… {self.dropped:,} line{'s' * (self.dropped != 1)} dropped\n"
        self.dropped = 0
        return [Lines(self, text.encode(), 0)]


def _pieces(data: bytes) -> Iterator[tuple[str, bool]]:
    """Return the lines of a text that ends with a line end, in pieces, and whether each is the last of its line."""
    for line in data.decode("utf-8", "backslashreplace").split("\n")[:-1]:
        whole = line.removesuffix("\r")
        start = 0
        while len(whole) - start > LONGEST_LINE:
            yield whole[start : start + LONGEST_LINE], False
            start += LONGEST_LINE
        yield whole[start:], True


class OutputReader:
    """The thread of the host that reads the pipes of all executor processes. It starts with the first. Thread-safe.

    Names of modules are looked up when used, so that under gevent the thread is a greenlet and yields.
    """

    cpu_share, cpu_burst = CPU_SHARE, _CPU_BURST

    def __init__(self, log: Log = standard_error) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._closing = threading.Event()
        #: Pipes to watch from now on, and pipes whose executor has ended.
        self._added: deque[OutputPipe] = deque()
        self._ended: deque[OutputPipe] = deque()
        #: By the name of the confinement. Guarded by the lock.
        self._logs: dict[str, ConfinementLog] = {}
        # Only for the thread:
        self._pipes: dict[int, OutputPipe] = {}
        #: Pipes that nobody can write to any more, until their executor has ended.
        self._silent: set[OutputPipe] = set()
        self._cpu_left = self.cpu_burst
        self._cpu_since = time.monotonic()
        #: Since when the log takes nothing (`time.monotonic`); None if it does.
        self._deaf_since: float | None = None

    def open(self, name: str, policy: str, key: str | None, *, own_user: bool = True) -> OutputPipe:
        """Return a new pipe for an executor of the confinement ``name``. Raises `KernelError`, OSError.

        ``own_user``: its code runs as another user than the server.
        """
        with self._lock:
            if self._closing.is_set():
                raise BrokenPipeError(errno.EPIPE, "closed")
            if self._thread is None:
                self._start()
            log = self._logs.get(name)
            if log is None:
                self._logs = {of: one for of, one in self._logs.items() if not one.is_idle}
                log = self._new_log(policy, key)
            pipe = self._new_pipe(log, own_user=own_user)
            self._logs[name] = log
            log.pipes += 1
            self._added.append(pipe)
        self._wake_up()
        return pipe

    def _new_log(self, policy: str, key: str | None) -> ConfinementLog:
        return ConfinementLog(policy, key)

    def _new_pipe(self, log: ConfinementLog, *, own_user: bool) -> OutputPipe:  # noqa: ARG002 - of a subclass
        return OutputPipe(log)

    def _start(self) -> None:
        wake = descriptors.event_counter()
        try:
            self._wake = wake
            thread = threading.Thread(target=self._run, name="rcon-output", daemon=True)
            threads.start(thread)
        except BaseException:
            self._wake = -1
            posix.close(wake)
            raise
        self._thread = thread

    def finish(self, pipe: OutputPipe) -> None:
        """Read what is left in the pipe of an executor that has ended, and close its reader. Does not wait."""
        self._ended.append(pipe)
        self._wake_up()

    def close(self) -> None:
        """Read what is left in all pipes, end the thread, and wait for it."""
        with self._lock:
            self._closing.set()
        self._wake_up()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)
            with self._lock:
                if self._wake >= 0 and not thread.is_alive():
                    posix.close(self._wake)
                    self._wake = -1

    def _wake_up(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        attempts = Attempts()
        while True:
            try:
                ready = self._wait()
            except OSError as error:  # no memory: code must not wait for ever for room in its pipe
                if attempts.failed():
                    LOGGER.error(
                        "the output of executor processes cannot be waited for; trying again: %s", error
                    )
                time.sleep(FIRST_PAUSE)
                ready = []
            began = time.thread_time()
            closing = self._closing.is_set()
            try:
                self._read(ready, last=closing)
            except Exception:
                # A failure must not end the thread: code would wait for ever for room in its pipe.
                LOGGER.exception("the output of executor processes could not be read")
            if closing:
                return
            self._closing.wait(self._pause_after(time.thread_time() - began + _WAKE_UP))

    def _wait(self) -> list[OutputPipe]:
        """Wait until a pipe can be read, or for a call of another thread. Return the pipes to read."""
        waiting = select.poll()
        waiting.register(self._wake, select.POLLIN)
        for descriptor in self._pipes:
            waiting.register(descriptor, select.POLLIN)
        soon = 0 if self._closing.is_set() else None
        if self._ended:
            soon = 0  # the last round ended before it came to them
        if soon is None and (self._deaf_since is not None or any(log.dropped for log in self._all_logs())):
            soon = 1000
        ready = {descriptor for descriptor, _ in waiting.poll(soon)}
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        return [pipe for descriptor, pipe in self._pipes.items() if descriptor in ready]

    def _all_logs(self) -> list[ConfinementLog]:
        with self._lock:
            return list(self._logs.values())

    def _read(self, ready: Iterable[OutputPipe], *, last: bool) -> None:
        """Read pipes, close those of executors that have ended, and log."""
        while self._added:
            pipe = self._added.popleft()
            if not pipe.ended:
                self._pipes[pipe.reader] = pipe
        with self._log() as descriptor:
            heard = self._is_heard(descriptor, last=last)
            if heard is None:
                return  # the log may take lines soon; meanwhile writers wait when their pipe is full
            lines: list[Lines] = []
            until = time.thread_time() + _ROUND
            while self._ended and (last or time.thread_time() < until):
                lines += self._read_last(self._ended.popleft(), heard=heard)
            for pipe in sorted(ready, key=lambda pipe: pipe.log.used):
                if pipe.ended:
                    continue
                some, over = pipe.read(_READS, heard=heard)
                lines += some
                if over:
                    del self._pipes[pipe.reader]
                    self._silent.add(pipe)
                if time.thread_time() >= until and not last:
                    break
            if last:
                for pipe in [*self._pipes.values(), *self._silent]:
                    lines += self._read_last(pipe, heard=heard)
            if heard:
                for log in self._all_logs():
                    log.refill()
                    if last or not log.is_full:
                        lines += log.take_notice()
            self._write(descriptor, lines)

    def _read_last(self, pipe: OutputPipe, *, heard: bool) -> list[Lines]:
        if pipe.ended:
            return []
        self._pipes.pop(pipe.reader, None)
        self._silent.discard(pipe)
        lines = pipe.read_last(heard=heard)
        with self._lock:
            pipe.log.pipes -= 1
        return lines

    def _is_heard(self, descriptor: int, *, last: bool) -> bool | None:
        """Return whether the log takes lines; None if it does not just now."""
        if _is_writable(descriptor, PATIENCE if last else 0):
            self._deaf_since = None
            return True
        now = time.monotonic()
        self._deaf_since = self._deaf_since or now
        return False if last or now - self._deaf_since > PATIENCE else None

    def _write(self, descriptor: int, lines: list[Lines]) -> None:
        """Write lines to the log. Count as dropped what it does not take."""
        until = time.monotonic() + _SHORT_PATIENCE
        for number, some in enumerate(lines):
            left = memoryview(some.text)
            try:
                while left:
                    piece = left[: _whole_lines(some.text, len(some.text) - len(left))]
                    if not _is_writable(descriptor, max(0.0, until - time.monotonic())):
                        raise BlockingIOError(errno.EAGAIN, "the log takes nothing")
                    left = left[posix.write(descriptor, piece) :]
            except OSError:
                some.log.dropped += bytes(left).count(b"\n")
                for other in lines[number + 1 :]:
                    other.log.dropped += other.count
                return

    def _pause_after(self, spent: float) -> float:
        """Return how long to pause after a round that took so many seconds of CPU time."""
        now = time.monotonic()
        saved = self._cpu_left + (now - self._cpu_since) * self.cpu_share
        self._cpu_left = min(self.cpu_burst, saved) - spent
        self._cpu_since = now
        return min(max(_PAUSE, -self._cpu_left / self.cpu_share), _LONGEST_PAUSE)


def _is_writable(descriptor: int, timeout: float) -> bool:
    try:
        return bool(poll({descriptor: POLLOUT}, timeout).get(descriptor, 0) & POLLOUT)
    except KernelError:
        return False


def _whole_lines(text: bytes, start: int) -> int:
    """Return the length of the whole lines from ``start`` that one write takes; of a part of a line if it is long."""
    if len(text) - start <= _ATOMIC:
        return len(text) - start
    end = text.rfind(b"\n", start, start + _ATOMIC) + 1
    return end - start if end > start else _ATOMIC


def _end_of_characters(text: bytes) -> int:
    """Return the length of the text without a UTF-8 character that is not complete."""
    for back in range(1, 4):
        if text[-back] & 0xC0 == 0xC0:
            return len(text) - back
        if text[-back] < 0x80:
            break
    return len(text)


def log_prefix(policy: str, key: str | None) -> str:
    """Return the prefix of each line that confined code logs. A client may have sent the key."""
    shown = quote(key[:_KEY_CHARACTERS], safe="/:@", errors="backslashreplace") if key is not None else ""
    return f"[{policy} {shown}] " if shown else f"[{policy}] "


def prefix_lines(text: str, prefix: str) -> str:
    """Return the text with ``prefix`` before each line, and unprintable characters escaped."""
    return "".join([f"{prefix}{escape_unprintable(line)}\n" for line in text.splitlines()])


def escape_unprintable(line: str) -> str:
    """Return the line with unprintable characters escaped, except tabs."""
    return line if line.isprintable() else line.translate(_ESCAPES)


class _Escapes(dict[int, str]):
    """What stands for a character, by its number. A tenant chooses the characters, so that only the first are kept."""

    def __missing__(self, number: int) -> str:
        character = chr(number)
        shown = character
        if not character.isprintable() and character != "\t":
            shown = character.encode("unicode_escape").decode("ascii")
        if number < _KEPT:
            self[number] = shown
        return shown


_KEPT: Final = 0x250  # Latin letters and control characters
_ESCAPES: Final = _Escapes()
