"""The executor's side: run the application once for each request that the host sends."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from rcon_plugins.executors.channel import CHUNK, MAX_PAYLOAD, Channel, ChannelClosed, Frame
from rcon_wsgi import wire
from rcon_wsgi.streams import Conversation, Errors, FileWrapper, Input

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import WSGIApplication

#: The amount of a list's chunks that is sent together, bytes.
_BATCH: Final = 256 * 1024
_VERSION: Final = (1, 0)
_END: Final = (wire.END, b"")
#: Exceptions that end the executor process: its host is gone, or the application ends the process.
_ENDS_THE_PROCESS: Final = (ChannelClosed, SystemExit, KeyboardInterrupt)


class WsgiService:
    """Serves a WSGI application in executor processes; give it to `Deployment.start`."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, channel: Channel, frame: Frame) -> None:
        """Run one request; ``frame`` is its first frame. Return when its last frame is sent.

        Exceptions of the application are sent to the host. `ChannelClosed`, SystemExit and KeyboardInterrupt are
        raised: the process must end.
        """
        number, environ = wire.receive_request(channel, frame)
        conversation = Conversation(channel)
        errors = Errors(conversation)
        environ["wsgi.version"] = _VERSION
        environ["wsgi.input"] = Input(conversation)
        environ["wsgi.errors"] = errors
        environ["wsgi.file_wrapper"] = FileWrapper
        environ["wsgi.multithread"] = False
        environ["wsgi.multiprocess"] = True
        answer = _Answer(conversation, number)
        try:
            last = self._run(environ, answer, conversation)
        except _ENDS_THE_PROCESS:
            raise
        except BaseException as error:  # noqa: BLE001 - send any exception of the application to the host
            failure = wire.encode_failure(error, input_failed=error is conversation.input_error)
            last = [(wire.ERROR, number + failure)]
        if conversation.mine:
            errors.flush()
        conversation.say_last(*last)

    def _run(
        self, environ: dict[str, Any], answer: _Answer, conversation: Conversation
    ) -> list[tuple[int, bytes]]:
        """Run the application and send its response. Return the frames that are left to send."""
        result = self._app(environ, answer.start_response)
        kind = type(result)
        if isinstance(result, list | tuple) and kind in (list, tuple):
            return answer.batch(result)
        try:
            answer.stream(result)
            tail = answer.tail()
            if kind is types.GeneratorType or not hasattr(result, "close"):
                return [*tail, answer.done]  # closing an exhausted generator does nothing
            conversation.say(*tail, _END)
        finally:
            close = getattr(result, "close", None)
            if close is not None and conversation.mine:
                close()
        return [answer.done]


class _Answer:
    """One response: applies the rules of PEP 3333, and sends the headers with the first chunk."""

    def __init__(self, conversation: Conversation, number: bytes) -> None:
        self.done = (wire.DONE, number)
        self._conversation = conversation
        self._number = number
        self._start: bytes | None = None
        self._started = False

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """Set status and headers, as PEP 3333's ``start_response``."""
        if exc_info:
            try:
                if self._started and exc_info[1] is not None:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # avoid a reference cycle
        elif self._start is not None:
            raise AssertionError("start_response() was called again without exc_info")
        self._start = wire.encode_start(status, headers)
        return self.write

    def write(self, data: bytes) -> None:
        """Send data immediately, as PEP 3333's ``write``. Blocks while the client does not read."""
        self._send(data)

    def stream(self, result: Iterable[bytes]) -> None:
        """Send each chunk as soon as the application has made it."""
        iterator = iter(result)
        only = not self._started and _length_is_one(result)
        for data in iterator:
            self._send(data, only=only)
            only = False

    def batch(self, result: list[bytes] | tuple[bytes, ...]) -> list[tuple[int, bytes]]:
        """Send the chunks of a whole result, many at a time. Return the last frames, unsent."""
        if len(result) == 1 and not self._started and len(result[0]) <= MAX_PAYLOAD:
            return [*self.tail(), (wire.ONLY, _checked(result[0])), self.done]
        first = not self._started
        frames = self.tail()
        size = 0
        for data in result:
            if not _checked(data) and not first:
                continue
            first = False
            for piece in _pieces(data):
                frames.append((wire.DATA, piece))
                size += len(piece)
                if size >= _BATCH:
                    self._conversation.say(*frames)
                    frames = []
                    size = 0
        frames.append(self.done)
        return frames

    def tail(self) -> list[tuple[int, bytes]]:
        """Return the frame of the headers if they have not been sent, else no frame."""
        if self._started:
            return []
        if self._start is None:
            raise AssertionError(
                "the application returned a body, or ended, without calling start_response()"
            )
        self._started = True
        return [(wire.START, self._number + self._start)]

    def _send(self, data: bytes, *, only: bool = False) -> None:
        if not _checked(data) and self._started:
            return  # an empty chunk sends the headers, and nothing else
        if len(data) <= MAX_PAYLOAD:
            self._conversation.say(*self.tail(), (wire.ONLY if only else wire.DATA, data))
            return
        for piece in _pieces(data):
            self._conversation.say(*self.tail(), (wire.DATA, piece))


def _checked(data: bytes) -> bytes:
    if isinstance(data, bytes):
        return data
    raise TypeError(f"a body is made of bytes, not {type(data).__name__}")


def _pieces(data: bytes) -> Iterable[bytes]:
    if len(data) <= MAX_PAYLOAD:
        return (data,)
    return (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


def _length_is_one(result: Iterable[bytes]) -> bool:
    try:
        return len(result) == 1  # type: ignore[arg-type]
    except (TypeError, AttributeError, NotImplementedError):
        return False
