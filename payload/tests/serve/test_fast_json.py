"""JSON by pydantic-core takes and writes what `json` takes and writes."""

import json
import math
from typing import Any

import pytest

from llmserve.fast_json import parse, serialize
from llmserve.protocol import Delta, Done, Generate, ProtocolError, decode, encode


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    "document",
    [
        b'{"a": 1, "a": 2}',
        rb'"\ud800"',
        rb'["\udfff and \ud83d\ude00"]',
        nested(199),
        nested(201),
        nested(900),
        b"1e999",
        b"-0",
        b"12345678901234567890123",
        b' {"a": [1.5, null, true]} \r',
        '"h\u00e9\u2028"'.encode(),
    ],
)
def test_a_document_has_the_value_that_json_gives_it(document: bytes) -> None:
    assert parse(document) == json.loads(document)
    assert parse(serialize(parse(document))) == json.loads(document)


def test_numbers_that_are_none_pass_both_ways() -> None:
    assert [math.isnan(each) for each in parse(serialize([math.nan, 1.0]))] == [True, False]
    assert parse(serialize([math.inf, -math.inf])) == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"{} x",
        b'{"a": 1,}',
        b"01",
        b'"a\x01b"',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b"1" * 5000,
    ],
)
def test_what_is_no_utf_8_json_is_refused(document: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is the parser's
        parse(document)
    with pytest.raises(ProtocolError):
        decode(document)


def test_depth_beyond_the_interpreters_limit_is_a_recursion_error() -> None:
    with pytest.raises(RecursionError):
        parse(nested(200_000))
    with pytest.raises(ProtocolError):
        decode(nested(200_000))
    value: list[Any] = []
    for _ in range(200_000):
        value = [value]
    with pytest.raises(RecursionError):
        serialize(value)


@pytest.mark.parametrize("text", ["", "a\nb\r\n\x00\u2028\x85", "\ud800", "h\u00e9 \U0001f600", '"\\'])
def test_a_frame_is_one_line_and_carries_any_text(text: str) -> None:
    for frame in Delta(5, text), Done(5, text, "stop", 1, 2), Generate(5, True, 9, prompt=text):
        line = encode(frame)
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        assert decode(line) == frame
        assert json.loads(line)["id"] == 5


def test_a_frame_carries_a_clients_deepest_document() -> None:
    """The gateway takes 200 levels of a client, which a frame encloses in two more."""
    deepest: Any = []
    for _ in range(198):
        deepest = [deepest]
    frame = Generate(1, False, 9, extra={"tools": deepest})
    assert decode(encode(frame)) == frame
