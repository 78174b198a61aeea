"""Texts cut into passages."""

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from llmserve.documents.passages import TOKENS, normalized, passages, tokens

ALPHABET = "ab .\n\f。，中文!?"


@given(st.text(alphabet=ALPHABET, max_size=400), st.integers(1, 30))
def test_passages_are_the_text_at_their_offsets_and_leave_out_nothing_but_blanks(
    text: str, limit: int
) -> None:
    end = 0
    for number, passage in enumerate(passages(text, limit)):
        assert passage.number == number
        assert passage.text == text[passage.start : passage.end]
        assert not text[end : passage.start].strip()
        assert tokens(passage.text) <= limit
        assert passage.page == text.count("\f", 0, passage.start) + 1
        end = passage.end
    assert not text[end:].strip()


def test_a_passage_ends_with_a_paragraph_rather_than_with_a_sentence() -> None:
    text = "A. " * 200 + "\n\n" + "B. " * 20 + "C" * 400
    first, second, *_ = passages(text)
    assert (first.text[-2:], second.text[:2]) == ("A.", "B.")


def test_a_chinese_passage_ends_with_a_sentence() -> None:
    first, *_ = passages("我们的规定。" * 100)
    assert first.text.endswith("。")
    assert tokens(first.text) <= TOKENS


def test_a_passage_never_crosses_a_page() -> None:
    assert [(each.page, each.text) for each in passages("one\ftwo\f\fthree")] == [
        (1, "one"),
        (2, "two"),
        (4, "three"),
    ]


def test_letters_that_are_not_seen_are_dropped() -> None:
    hidden = "pay\u200bment\u202e \u00ad\x00\x1b[31m\ue000\U000e0041 due\r\nnow\rthen"
    assert normalized(hidden) == "payment [31m due\nnow\nthen"


def test_the_hash_is_of_the_text() -> None:
    [passage] = passages("  Ärger ")
    assert passage.hash == sha256("Ärger".encode()).hexdigest()
