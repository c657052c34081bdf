"""Applications for each behaviour that WSGI allows, and requests that show it.

Each application is served alone, confined inline, and confined in a process. A client must see no difference.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Environ = dict[str, Any]
Application = Callable[[Environ, Any], Iterable[bytes]]

TEXT = [("Content-Type", "text/plain; charset=utf-8")]
BODY = b"first line\nsecond line\r\n\nfourth" + bytes(range(256)) * 700 + b"\nlast, without an end"


class Case(NamedTuple):
    """An application, and one request to it."""

    app: Application
    method: str = "GET"
    path: str = ""
    headers: tuple[str, ...] = ()
    body: bytes = b""
    #: Whether the request is sent chunked, which wsgiref's server does not understand.
    chunked: bool = False
    #: Whether wsgiref.validate accepts the application itself.
    valid: bool = True
    #: Whether the chunks of a response are the same, not only their sum.
    framing: bool = True
    #: The servers to send the request to.
    servers: tuple[str, ...] = ("wsgiref", "gunicorn")


CASES: dict[str, Case] = {}


def case(name: str = "", **options: Any) -> Callable[[Application], Application]:
    def add(app: Application) -> Application:
        CASES[name or app.__name__] = Case(app, **options)
        return app

    return add


class Closing:
    """An iterable with a close() that writes to the server's log."""

    def __init__(self, chunks: Iterable[bytes], mark: str = "closed") -> None:
        self._chunks = chunks
        self._mark = mark

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    def close(self) -> None:
        print(f"<{self._mark}>", file=sys.stderr, flush=True)


class ClosingOfLength(Closing):
    def __len__(self) -> int:
        return 1


@case("hello")
@case("hello-HEAD", method="HEAD")
@case("hello-POST-unread", method="POST", body=b"nobody reads me")
@case("hello-keep-alive", headers=("Connection: keep-alive",))
def hello(environ: Environ, start_response: Any) -> Iterable[bytes]:
    body = b"Hello, world!\n"
    start_response("200 OK", [*TEXT, ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


@case("length-of-one")
def length_of_one(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return [b"a server may work out the length of this"]


@case("length-of-one-and-close")
def length_of_one_and_close(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return ClosingOfLength([b"a server may work out the length of this, too"])


@case("empty-list")
def empty_list(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return []


@case("no-content")
def no_content(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("204 No Content", [("X-Kept", "yes")])
    return []


@case("not-modified")
def not_modified(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("304 Not Modified", [("ETag", '"x"')])
    return iter(())


@case("tuple")
def tuple_of_chunks(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return (b"one", b"", b"two", b"three" * 1000)


@case("many-chunks", framing=False)  # the host joins so many chunks at once
def many_chunks(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return [b"%06d\n" % number * 100 for number in range(2000)]


@case("generator")
def generator(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b"one"
    yield b"two"


@case("generator-empty-first")
def generator_empty_first(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b""
    yield b"one"
    yield b""


@case("generator-nothing")
def generator_nothing(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield from ()


@case("closing")
def closing(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return Closing([b"one", b"two"])


@case("closing-nothing")
def closing_nothing(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return Closing([])


@case("large-chunk", framing=False)
def large_chunk(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT, ("Content-Length", str(3 << 20))])
    return [b"x" * (3 << 20)]


@case("large-chunk-of-generator", framing=False)
def large_chunk_of_generator(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b"x" * (3 << 20)
    yield b"end"


@case("write")
def write_only(environ: Environ, start_response: Any) -> Iterable[bytes]:
    write = start_response("200 OK", [*TEXT])
    write(b"written ")
    write(b"twice")
    return []


@case("write-and-return")
def write_and_return(environ: Environ, start_response: Any) -> Iterable[bytes]:
    write = start_response("200 OK", [*TEXT])
    write(b"written, ")
    return [b"and returned"]


@case("write-and-yield")
def write_and_yield(environ: Environ, start_response: Any) -> Iterable[bytes]:
    write = start_response("200 OK", [*TEXT])
    write(b"written, ")
    return Closing([b"and yielded, ", b"and more"])


# gunicorn alone sends the headers of both calls. A process sends those of the last call, as PEP 3333 requires.
@case("exc-info-before-headers", servers=("wsgiref",))
def exc_info_before_headers(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    try:
        raise ValueError("a mistake")
    except ValueError:
        start_response("500 Oh No", [*TEXT, ("X-Instead", "yes")], sys.exc_info())
    return [b"an error page"]


@case("exc-info-before-headers-404", servers=("wsgiref",))
def exc_info_before_headers_404(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    try:
        raise ValueError("a mistake")
    except ValueError:
        start_response("404 Not Found", [*TEXT, ("X-Instead", "yes")], sys.exc_info())
    return [b"another page"]


@case("exc-info-after-headers")
def exc_info_after_headers(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b"begun, "
    try:
        raise ValueError("a mistake too late")
    except ValueError:
        start_response("500 Oh No", [*TEXT], sys.exc_info())
    yield b"never sent"


@case("start-response-twice", valid=False)
def start_response_twice(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    start_response("200 OK", [*TEXT])
    return [b"never sent"]


@case("error-at-once")
def error_at_once(environ: Environ, start_response: Any) -> Iterable[bytes]:
    raise LookupError("the application failed at once")


@case("error-after-start-response")
def error_after_start_response(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    raise LookupError("the application failed after start_response")


@case("error-before-first-chunk")
def error_before_first_chunk(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield from ()
    raise LookupError("the application failed before the first chunk")


@case("error-in-the-stream")
def error_in_the_stream(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b"begun"
    raise LookupError("the application failed in the stream")


@case("error-in-the-stream-with-length")
def error_in_the_stream_with_length(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT, ("Content-Length", "1000")])
    yield b"begun"
    raise LookupError("the application failed in the stream")


@case("error-in-close", headers=("Connection: close",))
def error_in_close(environ: Environ, start_response: Any) -> Iterable[bytes]:
    class Failing(Closing):
        def close(self) -> None:
            raise LookupError("the application failed in close()")

    start_response("200 OK", [*TEXT, ("Content-Length", "3")])
    return Failing([b"one"])


@case("error-500-of-its-own")
def error_of_its_own(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("500 Internal Server Error", [*TEXT])
    return Closing([b"a page ", b"of its own"])


@case("error-500-long", framing=False)
def error_of_its_own_long(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("500 Internal Server Error", [*TEXT])
    return Closing([b"x" * 50_000] * 20)


@case("error-500-one")
def error_of_its_own_one(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("500 Internal Server Error", [*TEXT])
    return [b"a page of its own"]


@case("no-start-response", valid=False, servers=("wsgiref",))
def no_start_response(environ: Environ, start_response: Any) -> Iterable[bytes]:
    return [b"never sent"]


@case("not-bytes", valid=False)
def not_bytes(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    chunks: list[Any] = [b"begun, ", "text"]
    return iter(chunks)


@case("cookies")
def cookies(environ: Environ, start_response: Any) -> Iterable[bytes]:
    headers = [("Set-Cookie", f"c{n}=v{n}; Path=/; HttpOnly") for n in range(5)]
    start_response("200 OK", [*TEXT, *headers, ("X-Again", "1"), ("x-again", "2")])
    return [b"cookies"]


@case("latin-1", servers=("gunicorn",))
def latin_1(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 Tr\u00e8s bien", [*TEXT, ("X-Name", "Jos\u00e9 \u00ff")])
    return [b"latin-1"]


@case("large-headers")
def large_headers(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT, *[(f"X-Large-{n}", "v" * 4000) for n in range(50)]])
    return [b"large headers"]


@case("environ", path="/%E3%81%82/a%2Fb%20c;p=1?q=%E3%81%82&x=%00", headers=("Host: EXAMPLE.com:81",))
@case("environ-non-utf-8", path="/%FF%FE")
@case("environ-large", headers=tuple(f"X-Large-{n}: {'v' * 7000}" for n in range(60)))
@case("environ-repeated", headers=("X-A: 1", "X-A: 2", "Cookie: a=1", "Cookie: b=2", "Accept:"))
def show_environ(environ: Environ, start_response: Any) -> Iterable[bytes]:
    """Return all values of the environ that should reach the application, as it sees them."""
    kinds = (str, bytes, int, float, bool, type(None), tuple, list, dict)
    own = ("wsgi.multithread", "wsgi.multiprocess", "REMOTE_PORT", "SERVER_PORT")
    servers = tuple(os.environ)  # wsgiref's server adds these, too
    shown = {
        key: ascii(value)
        for key, value in environ.items()
        if isinstance(value, kinds) and key not in own and (key not in servers or key.startswith("RCON_TEST"))
    }
    body = json.dumps(shown, sort_keys=True, indent=1).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


@case("streams")
def streams(environ: Environ, start_response: Any) -> Iterable[bytes]:
    environ["wsgi.errors"].write("<errors: caf\u00e9")
    environ["wsgi.errors"].writelines([" and", " more>\n"])
    environ["wsgi.errors"].write("<errors without an end>")
    environ["wsgi.errors"].flush()
    start_response("200 OK", [*TEXT])
    return [repr(environ["wsgi.version"]).encode()]


@case("echo", method="POST", body=BODY)
@case("echo-nothing", method="POST")
@case("echo-100-continue", method="POST", body=BODY, headers=("Expect: 100-continue",))
def echo(environ: Environ, start_response: Any) -> Iterable[bytes]:
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [*TEXT, ("Content-Length", str(len(body)))])
    return [body]


@case("echo-chunked", method="POST", body=BODY, chunked=True, valid=False, servers=("gunicorn",))
@case("echo-read-all", method="POST", body=BODY, valid=False, servers=("gunicorn",))
def echo_all(environ: Environ, start_response: Any) -> Iterable[bytes]:
    body = environ["wsgi.input"].read()
    start_response("200 OK", [*TEXT, ("Content-Length", str(len(body)))])
    return [body, environ["wsgi.input"].read()]


@case("read-in-pieces", method="POST", body=BODY, servers=("gunicorn",))
@case("read-in-pieces-chunked", method="POST", body=BODY, chunked=True, servers=("gunicorn",))
def read_in_pieces(environ: Environ, start_response: Any) -> Iterable[bytes]:
    stream = environ["wsgi.input"]
    start_response("200 OK", [*TEXT])
    pieces = [
        stream.read(0),
        stream.read(5),
        stream.readline(),
        stream.readline(3),
        stream.read(70_000),
        stream.readline(),
        stream.read(1 << 20),
        stream.read(10),
        stream.readline(),
    ]
    return [repr([(len(p), hashlib.sha256(p).hexdigest()) for p in pieces]).encode()]


@case("lines", method="POST", body=BODY, servers=("gunicorn",))
def lines(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return [b"%d\n" % len(line) for line in environ["wsgi.input"]]


@case("readlines", method="POST", body=BODY, servers=("gunicorn",))
def readlines(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return [b"%d\n" % len(line) for line in environ["wsgi.input"].readlines()]


@case("readlines-hint", method="POST", body=BODY, servers=("gunicorn",))
def readlines_hint(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    first = environ["wsgi.input"].readlines(5)  # a hint, which gunicorn ignores
    return [hashlib.sha256(b"".join(first) + environ["wsgi.input"].read(len(BODY))).digest()]


@case("echo-while-streaming", method="POST", body=BODY)
def echo_while_streaming(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    left = int(environ["CONTENT_LENGTH"])
    while left:
        piece = environ["wsgi.input"].read(min(left, 10_000))
        left -= len(piece)
        yield piece


@case("read-in-a-thread", method="POST", body=BODY)
def read_in_a_thread(environ: Environ, start_response: Any) -> Iterable[bytes]:
    found: list[bytes] = []
    length = int(environ["CONTENT_LENGTH"])
    thread = threading.Thread(target=lambda: found.append(environ["wsgi.input"].read(length)))
    thread.start()
    thread.join()
    start_response("200 OK", [*TEXT])
    return found


@case("file-wrapper", framing=False)
def file_wrapper(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](io.BytesIO(BODY), 4096)
    return wrapped


@case("file-wrapper-of-a-file", framing=False)
def file_wrapper_of_a_file(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](Path(__file__).open("rb"))  # noqa: SIM115 - the server closes it
    return wrapped


@case("headers-of-subclasses", valid=False, servers=("gunicorn",))
def headers_of_subclasses(environ: Environ, start_response: Any) -> Iterable[bytes]:
    class Text(str):
        __slots__ = ()

    start_response(Text("200 OK"), [(Text("Content-Type"), Text("text/plain"))])
    return [b"subclasses of str"]


@case("header-with-a-line-break", valid=False, servers=("gunicorn",))
def header_with_a_line_break(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT, ("X-Split", "a\r\nX-Injected: b")])
    return [b"never sent"]


def by_path(environ: Environ, start_response: Any) -> Iterable[bytes]:
    """Serve all cases: the first segment of the path is the name of a case."""
    name, slash, rest = environ["PATH_INFO"][1:].partition("/")
    environ["SCRIPT_NAME"] += f"/{name}"
    environ["PATH_INFO"] = slash + rest
    return CASES[name].app(environ, start_response)
