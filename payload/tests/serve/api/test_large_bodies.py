"""A body within the limits is validated on the event loop, and must not hold it: `bench/serving/slow_body.py` has the times."""

import time
import tracemalloc
from contextlib import suppress

import pytest
from large_bodies import chat_of, large_bodies, reader

from llmserve.api.errors import ApiError
from llmserve.gateway.middleware import BODIES_BYTES
from llmserve.gateway.parsed_requests import ParsedRequests, chat
from llmserve.settings import MOST_BODY_BYTES
from llmserve.upstream.openai_client import http_request

GRANTED = 2048  # tokens of an answer


def test_no_large_body_is_validated_for_more_than_50_ms() -> None:
    """A wrong item in each place of a list took seconds and 767 MB, 200,000 empty lists 75 ms."""
    for name, body in large_bodies(MOST_BODY_BYTES):
        seconds = []
        for _ in range(3):
            before = time.thread_time()  # CPU time, the least of three: the machine may be busy
            with suppress(ApiError):
                reader(name)(body, GRANTED)
            seconds.append(time.thread_time() - before)
        assert min(seconds) < 0.05, name


def test_a_parsed_body_takes_no_more_memory_than_the_gateway_reckons_with() -> None:
    """Each character of a text with an emoji takes four bytes. The transport to the upstream may hold one more copy of the body;
    that of the client is dropped.
    """
    parser = ParsedRequests(lambda _: "", b"secret")
    tracemalloc.start()
    sent = chat_of("word ", 1, MOST_BODY_BYTES - 10).replace(b"word ", "\U0001f600".encode(), 1)
    before, _ = tracemalloc.get_traced_memory()
    parsed = parser.read("t", chat, GRANTED, sent)
    held = parsed, http_request("m", parsed.call.generate, None)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    copies = 1 + (after - before) / len(sent)
    assert held
    assert 10.5 < copies < 11.1
    assert BODIES_BYTES * copies < 0.75 * 2**30


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model":"m","messages":[' + b'{"role":"user","content":"a"},' * 5000 + b"{}]}", "a list of"),
        (b'{"model":"m","messages":[1,2]}', "'messages.0' is 1"),
        (b'{"model":"m","messages":[{"role":"user","content":"a",' + b",".join(b'"k%d":1' % n for n in range(200)) + b"}]}",
            "'messages.0.k9'; remove"),
    ],
    ids=["too many messages", "a wrong message", "many unknown fields"],
)  # fmt: skip
def test_the_refusal_says_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(body, GRANTED)
    assert refused.value.status == 400
    assert message in refused.value.message


def test_a_body_of_many_values_is_refused_and_one_of_long_strings_is_not() -> None:
    with pytest.raises(ApiError) as refused:
        chat(b'{"model":"m","messages":[' + b"[[]]," * 30_000 + b"1]}", GRANTED)
    assert (refused.value.status, refused.value.code) == (413, "body_too_large")
    assert "outside of strings" in refused.value.message
    text = rb"[[\"\\,]]" * 50_000
    call = chat(b'{"model":"m","messages":[{"role":"user","content":"' + text + b'"}]}', GRANTED)
    assert call.generate.messages
    assert len(call.generate.messages[0]["content"]) == 350_000
