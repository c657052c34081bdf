"""Fuzz the decoders of what executor processes send: each returns a value, or refuses, and none costs much."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import msgspec

from rcon_celery import codec, decoding_cost
from rcon_celery import wire as task_wire
from rcon_plugins.executors.channel import CHUNK, Channel, ProtocolViolation
from rcon_wsgi import wire

JSON = "application/json"
ACCEPTED = {JSON: "utf-8"}
NUMBER = b"12345678"

_PARTS = (
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\\u", b"\\ud83d", b"0", b"1e9", b"-", b"null", b"true", b'"a"',
    b'"children":[]', b'"value":1', b'"error":', b" ", b"\n", b"\x00", b"\xff", b"\xf0\x9f\x98\x80", b"9" * 40,
    b'{"__type__":"decimal","__value__":"1"}', b'{"__type__":"uuid","__value__":{"hex":""}}', b"[[]]", b"[null,null]",
)  # fmt: skip
_UNITS = (
    b"[],", b"[1],", b"[[]],", b"{},", b'{"a":1},', b'{"a":{}},', b'"ab",', b'"\\u20ac",', b"300,", b"0.1,", b"1e5,",
    b'"\xf0\x9f\x98\x80",', b"true,", b"[" * 90 + b"]" * 90 + b",", b'{"a":' * 90 + b"1" + b"}" * 90 + b",",
    b'"' + b"a" * 30 + b'",', b'{"__type__":"date","__value__":"2020-01-01"},', b"9" * 40 + b",", b'"\\\\",',
    b'["",1],',
    b"1e-400,", b"5E-324,", b"0.12345678901234567,", rb'"\u0041\u0042",', b'{"__type__":"decimal","__value__":"1"},',
    b'{"__type__":"uuid","__value__":{"hex":"%032x"}},' % 5, rb'{"__typ\u0065__":"time","__value__":"01:02"},',
    b"%d.0," % (2**1023 + 2**970), b"9" * 4300 + b",", b'{"abcdefgh":"ijklmnop","q":[1,2]},', b'"\\ud83d\\ude00a",',
)  # fmt: skip


class _Socket:
    def __init__(self, random: Random, data: bytes) -> None:
        self._random = random
        self._data = data

    def recv(self, size: int) -> bytes:
        count = self._random.choice((1, 3, 100, size))
        piece, self._data = self._data[:count], self._data[count:]
        return piece


def small(random: Random) -> bool:
    """Decode a small input with one of the decoders; return whether it was accepted. Other exceptions are defects."""
    kind = random.randrange(6)
    try:
        if kind == 0:
            wire.decode_start(_msgpack(random, ["200 OK", [["A", "b"]]]))
        elif kind == 1:
            wire.decode_failure(_msgpack(random, ["T", "m", "t", True]))
        elif kind == 2:
            wire.decode_size(random.randbytes(random.choice((0, 3, 4, 4, 5))))
        elif kind == 3:
            _receive(random)
        elif kind == 4:
            data = _mutated(random, random.choice((b'{"value":1,"children":[]}', b"[1]", b"")))
            _read(codec.decode(task_wire.Payload(JSON, "utf-8", len(data)), bytearray(data), ACCEPTED))
        else:
            data = random.randbytes(random.randrange(60))
            decoding_cost.check(random.choice((decoding_cost.MSGPACK, decoding_cost.YAML, JSON)), data)
    except (ProtocolViolation, decoding_cost.TooCostly):
        return False
    return True


def _read(answer: Any) -> None:
    """Read an answer as `rcon_celery.call` does, which takes every exception for a malformed one."""
    try:
        codec.decode_exception(answer["error"], "")
    except (MemoryError, RecursionError) as error:
        raise AssertionError(repr(error)) from None
    except Exception:
        return


def _receive(random: Random) -> None:
    data = random.randbytes(random.choice((1, 10, CHUNK, CHUNK + 1)))
    head = _msgpack(random, [NUMBER, "ok", "", [JSON, "utf-8", len(data)], False])
    frames = [
        (task_wire.ANSWER, head),
        *[(task_wire.DATA, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)],
    ]
    if random.random() < 0.5:
        frames.insert(random.randrange(3), (random.randrange(256), random.randbytes(random.randrange(20))))
    stream = b"".join(bytes((kind,)) + len(part).to_bytes(4, "big") + part for kind, part in frames)
    if random.random() < 0.3:
        stream = _mutated(random, stream)
    channel = Channel(_Socket(random, stream))  # type: ignore[arg-type]
    try:
        task_wire.receive_answer(channel, NUMBER, 2**20)
    except ProtocolViolation:
        raise
    except Exception as error:
        if type(error).__name__ != "ChannelClosed":
            raise


def _msgpack(random: Random, value: Any) -> bytes:
    for _ in range(random.randrange(3)):
        odd: Any = random.choice(
            (None, 1, -1, 2**63, "", "é", "a\r\nb", "x" * 5000, [], [[]], {}, 1.5, b"x", [["A", "b"]] * 1001)
        )
        at = random.randrange(len(value) + 1)
        value = [*value[:at], odd, *value[at + random.randrange(2) :]]
    data = msgspec.msgpack.encode(value)
    return _mutated(random, data) if random.random() < 0.3 else data


def _mutated(random: Random, data: bytes) -> bytes:
    for _ in range(random.randrange(6)):
        at = random.randrange(len(data) + 1)
        data = data[:at] + random.choice(_PARTS) + data[at + random.randrange(3) :]
    return data


class Costs:
    """The most that large inputs cost: CPU seconds for the check and the decoder."""

    def __init__(self) -> None:
        self.accepted = self.refused = 0.0
        self.worst = self.worst_refused = b""
        self.count = 0

    def add(self, random: Random, largest: int = 16 * 2**20) -> None:
        """Make a large input of some units, check and decode it."""
        chosen = random.sample(_UNITS, random.randrange(1, 4))
        unit = b"".join(each * random.choice((1, 1, 2, 20)) for each in chosen)
        length = int(2 ** random.uniform(16, largest.bit_length() - 1))
        data = b'{"children":[],"value":[' + unit * (length // len(unit)) + b"1]}"
        before = time.process_time()
        try:
            decoding_cost.check(JSON, data)
            codec.decode_trusted(task_wire.Payload(JSON, "utf-8", len(data)), data)
        except decoding_cost.TooCostly:
            seconds = time.process_time() - before
            if seconds > self.refused:
                self.refused, self.worst_refused = seconds, unit
        except Exception:
            pass
        else:
            seconds = time.process_time() - before
            if seconds > self.accepted:
                self.accepted, self.worst = seconds, unit
        self.count += 1

    def __str__(self) -> str:
        return (
            f"{self.count} large answers: accepted ones cost at most {self.accepted:.3f} s ({self.worst[:40]!r}), "
            f"refused ones {self.refused:.3f} s ({self.worst_refused[:40]!r})"
        )
