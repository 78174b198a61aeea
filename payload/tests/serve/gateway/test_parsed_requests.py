"""Memoized requests: only the content, never a permission, and within bounds."""

import pytest

from llmserve.api.errors import ApiError
from llmserve.api.requests import Call
from llmserve.gateway import parsed_requests
from llmserve.gateway.parsed_requests import KEPT, KEPT_BYTES, ParsedRequest, ParsedRequests
from llmserve.protocol import Generate, Hello

GRANTED = 10
HELLO = Hello("echo", "r1", "echo", context=100, slots=1)


class Reader:
    """A fake parser that accepts everything and counts its calls."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def __call__(self, sent: bytes, granted: int) -> Call:
        self.seen.append(sent)
        if sent == b"wrong":
            raise ApiError(400, "invalid_value", "wrong")
        drawn = 1.0 if sent == b"drawn" else 0.0
        return Call("echo", Generate(0, False, granted, prompt=sent.decode(), temperature=drawn))


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def kept() -> ParsedRequests:
    return ParsedRequests(lambda text: f"proof of {text}", b"secret")


def test_identical_requests_of_a_tenant_are_parsed_once(kept: ParsedRequests, reader: Reader) -> None:
    first = kept.read("research", reader, GRANTED, b"a")
    assert kept.read("research", reader, GRANTED, b"a") is first
    assert (reader.seen, first.text, first.proof) == ([b"a"], "a", "proof of a")


def test_tenants_endpoints_and_limits_share_no_parsed_request(kept: ParsedRequests, reader: Reader) -> None:
    other = Reader()
    all_four = [
        kept.read("research", reader, GRANTED, b"a"),
        kept.read("sales", reader, GRANTED, b"a"),
        kept.read("research", reader, 5, b"a"),
        kept.read("research", other, GRANTED, b"a"),
    ]
    assert len({id(parsed) for parsed in all_four}) == 4
    assert [parsed.call.generate.max_tokens for parsed in all_four] == [10, 10, 5, 10]


def test_an_invalid_request_is_rejected_again(kept: ParsedRequests, reader: Reader) -> None:
    for _ in range(2):
        with pytest.raises(ApiError, match="wrong"):
            kept.read("research", reader, GRANTED, b"wrong")
    assert reader.seen == [b"wrong"] * 2


def test_a_sampled_request_is_not_memoized(kept: ParsedRequests, reader: Reader) -> None:
    for _ in range(2):
        kept.read("research", reader, GRANTED, b"drawn")
    assert reader.seen == [b"drawn"] * 2
    assert not kept.cache


def test_memoized_requests_are_bounded_in_number_and_length(kept: ParsedRequests, reader: Reader) -> None:
    for number in range(KEPT + 1):
        kept.read("research", reader, GRANTED, b"%d" % number)
    long = b"x" * (KEPT_BYTES + 1)
    for sent in (long, long, b"1", b"0"):
        kept.read("research", reader, GRANTED, sent)
    assert reader.seen[KEPT + 1 :] == [long, long, b"0"], "the first one was evicted"
    assert len(kept.cache) == KEPT


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "sales"},
        {"revision": 2},
        {"hello": Hello("echo", "r2", "echo", context=100, slots=1)},
        {"hello": Hello("echo", "r1", "echo", context=100, slots=1, template="other")},
    ],
    ids=["tenant", "policy", "model", "template"],
)
def test_a_memoized_request_has_a_cache_key_per_tenant_policy_and_model(change: dict[str, object]) -> None:
    parsed = ParsedRequest(parsed_requests.posted(b'{"prompt":"a"}', GRANTED), "a", "", b"secret")
    usual: dict[str, object] = {"tenant": "research", "revision": 1, "hello": HELLO}
    key = parsed.key(**usual)  # type: ignore[arg-type]
    assert parsed.key(**usual) == key  # type: ignore[arg-type]
    assert parsed.key(**usual | change) != key  # type: ignore[arg-type]
    assert parsed.key(**usual) == key  # type: ignore[arg-type]
