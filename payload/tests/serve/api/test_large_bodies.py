"""A body within the limits is validated on the event loop, and must not hold it: `bench/serving/slow_body.py` has the times."""

import time
from contextlib import suppress

import pytest
from large_bodies import large_bodies

from llmserve.api.errors import ApiError
from llmserve.gateway.parsed_requests import chat, embedding
from llmserve.settings import Limits


def test_no_large_body_is_validated_item_by_item_once_it_is_wrong() -> None:
    """Every error of such a body was listed before the first was reported, which took seconds and 767 MB."""
    limits = Limits()
    for name, body in large_bodies(limits.body_bytes):
        before = time.thread_time()  # CPU time: the machine may be busy
        with suppress(ApiError):
            (embedding if name.startswith("input") else chat)(body, limits)
        assert time.thread_time() - before < 0.4, name


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model":"m","messages":[' + b'{"role":"user","content":"a"},' * 5000 + b"{}]}", "a list of"),
        (b'{"model":"m","messages":[1,2]}', "'messages.0' is 1"),
        (b'{"model":"m","messages":[{' + b",".join(b'"k%d":1' % n for n in range(200)) + b"}]}", "the body has 20"),
    ],
    ids=["too many messages", "a wrong message", "many unknown fields"],
)  # fmt: skip
def test_the_refusal_says_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(body, Limits())
    assert refused.value.status == 400
    assert message in refused.value.message
