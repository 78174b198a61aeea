"""The receiver that stands in for Logstash keeps to Lumberjack v2, and to its bounds."""

import asyncio
import json
import struct
import zlib
from typing import Any

import lumberjack
import pytest
from lumberjack import Refused, windows


def window(count: int) -> bytes:
    return b"2W" + struct.pack(">I", count)


def json_frame(sequence: int, document: Any) -> bytes:
    body = json.dumps(document).encode()
    return b"2J" + struct.pack(">II", sequence, len(body)) + body


def compressed(*frames: bytes) -> bytes:
    body = zlib.compress(b"".join(frames))
    return b"2C" + struct.pack(">I", len(body)) + body


def read(data: bytes) -> list[tuple[int, list[dict[str, Any]]]]:
    async def collected() -> list[tuple[int, list[dict[str, Any]]]]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return [each async for each in windows(reader)]

    return asyncio.run(collected())


def test_a_window_is_whole_with_its_last_number() -> None:
    plain = window(2) + json_frame(1, {"a": 1}) + json_frame(2, {"a": 2})
    packed = window(3) + compressed(*(json_frame(number, {"b": number}) for number in (1, 2, 3)))
    assert read(plain + packed) == [(2, [{"a": 1}, {"a": 2}]), (3, [{"b": 1}, {"b": 2}, {"b": 3}])]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"1W" + bytes(4), "version '1'"),
        (b"2X", "a frame 'X'"),
        (window(lumberjack.WINDOW + 1), "events in a window"),
        (window(1) + b"2J" + struct.pack(">II", 1, lumberjack.FRAME + 1), "bytes of a document"),
        (window(1) + b"2C" + struct.pack(">I", lumberjack.FRAME + 1), "bytes of a compressed frame"),
        (window(1) + compressed(json_frame(1, "x" * (lumberjack.UNPACKED + 1))), "more than"),
        (window(1) + b"2C" + struct.pack(">I", 4) + b"abcd", "a compressed frame:"),
        (window(1) + compressed(window(1)), "a frame 'W' in a compressed one"),
        (window(1) + compressed(json_frame(1, {})[:-1]), "ends outside"),
        (window(1) + json_frame(1, ["a list"]), "a document that is list"),
        (window(1) + b"2J" + struct.pack(">II", 1, 1) + b"{", "no JSON"),
        (window(1) + compressed(json_frame(1, {}), json_frame(2, {})), "2 documents in a window of 1"),
        (window(2) + json_frame(1, {}), "a window that is cut"),
        (window(1) + json_frame(1, {})[:-1], "a window that is cut"),
    ],
)
def test_what_is_not_the_protocol_or_too_large_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Refused, match=why):
        read(data)


def test_a_window_is_acknowledged_once_it_is_taken_and_the_client_is_told_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lumberjack, "KEEPALIVE_SECONDS", 0.05)
    written: list[bytes] = []
    taken: list[str] = []

    class Writer:
        def get_extra_info(self, _name: str) -> Any:
            return {"subject": ((("organizationName", "o"),), (("commonName", "llm1"),))}

        def write(self, data: bytes) -> None:
            written.append(data)

        async def drain(self) -> None:
            pass

        def close(self) -> None:
            written.append(b"closed")

    async def take(events: list[dict[str, Any]], subject: str) -> None:
        assert not written
        await asyncio.sleep(0.12)
        taken.append(f"{subject} {events}")

    async def conversation() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(window(1) + json_frame(7, {}))
        reader.feed_eof()
        await lumberjack.receiver(take)(reader, Writer())  # type: ignore[arg-type]

    asyncio.run(conversation())
    assert taken == ["CN=llm1,O=o [{}]"]
    wait, last = lumberjack.acknowledgement(0), lumberjack.acknowledgement(7)
    assert written[0] == wait
    assert written == [wait] * (len(written) - 2) + [last, b"closed"]
