"""Tokens and rows: loss masks, packing, and tokenizers and templates that cannot be used for training."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_set import made, rules_of, sentence, write_lines
from tiny import make_tokenizer

from llmtrain.data.chat import Chat, NotLearnable
from llmtrain.data.pack import best_fit
from llmtrain.data.rows import Rows, tokenizer_digest
from llmtrain.exits import Refusal

TALK = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well, 谢谢."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still well."},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer with a chat template."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def learned_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The text that contributes to the loss."""
    ids, learned = Chat(tokenizer, "tiny").tokens(messages)
    text: str = tokenizer.decode([each for each, yes in zip(ids, learned, strict=True) if yes])
    return text


def with_template(tokenizer: Any, template: str) -> Any:
    """Another tokenizer with another chat template."""
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_only_the_assistant_is_learned_and_the_token_that_ends_its_turn(tokenizer: Any) -> None:
    assert learned_text(tokenizer, TALK) == "Well, 谢谢.<|im_end|>Still well.<|im_end|>"


def test_a_templates_own_marks_are_taken_and_the_stop_token_after_them_too(tokenizer: Any) -> None:
    marked = with_template(tokenizer, MARKED)
    assert learned_text(marked, TALK) == "Well, 谢谢.<|im_end|>Still well.<|im_end|>"


def test_the_tokens_are_those_of_the_rendered_conversation(tokenizer: Any) -> None:
    ids, _ = Chat(tokenizer, "tiny").tokens(TALK)
    assert ids == tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False))["input_ids"]


ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "differently from its generation prompt|no token ends",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}" + ASKS,
            "no token ends the assistant's turn",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>{% endfor %}"
            + ASKS,
            "changes the assistant's text",
        ),
        (
            "{{ messages|length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
            + ASKS,
            "differently from its generation prompt",
        ),
    ],
    ids=["no-prompt", "no-stop", "changed", "not-a-prefix"],
)
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(
    tokenizer: Any, template: str, said: str
) -> None:
    with pytest.raises(Refusal, match=said):
        Chat(with_template(tokenizer, template), "tiny")


def test_a_conversation_without_an_answer_is_not_learnable(tokenizer: Any) -> None:
    with pytest.raises(NotLearnable, match="nothing to learn"):
        Chat(tokenizer, "tiny").tokens(TALK[:1])


def test_a_conversation_that_the_template_refuses_is_rejected_and_the_run_goes_on(tmp_path: Path) -> None:
    talks = [{"messages": TALK}, {"messages": TALK[1:]}]
    write_lines(tmp_path / "raw/a.jsonl", talks)
    made(tmp_path, duplicates={"near": None})
    assert rules_of(tmp_path) == ["template"]


def test_a_tokenizer_whose_pad_is_its_eos_learns_to_stop(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    described = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    described["pad_token"] = described["eos_token"]
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(described))
    write_lines(tmp_path / "raw/a.jsonl", [{"messages": TALK}, {"text": sentence(1)}])
    made(tmp_path)
    [row] = Rows(tmp_path / "out")
    ends = row.input_ids == 1
    assert row.learned[ends & (row.document > 0)].sum() == 3  # two turns and one text
    assert not row.learned[row.document == 0].any()
    assert (row.input_ids[row.document == 0] == 1).all()


def test_a_text_is_learned_whole_but_for_its_first_token_and_ends_with_eos(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", [{"text": sentence(1)}])
    made(tmp_path)
    [row] = Rows(tmp_path / "out")
    own = row.document == 1
    assert row.input_ids[own][-1] == 1
    assert row.learned[own].tolist() == [0] + [1] * (int(own.sum()) - 1)


def test_documents_that_share_a_row_are_numbered_and_whole(tmp_path: Path, tokenizer: Any) -> None:
    texts = [sentence(number, 10) for number in range(40)]
    write_lines(tmp_path / "raw/a.jsonl", [{"text": text} for text in texts])
    made(tmp_path)
    found = []
    for row in Rows(tmp_path / "out"):
        for number in range(1, int(row.document.max()) + 1):
            own = row.document == number
            assert row.position_ids[own].tolist() == list(range(int(own.sum())))
            found.append(tokenizer.decode(row.input_ids[own].tolist()).removesuffix("<|im_end|>"))
    assert sorted(found) == sorted(texts)


def test_unpacked_rows_have_one_document_each(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", [{"text": sentence(number, 10)} for number in range(9)])
    made(tmp_path, pack={"seq_len": 512, "packed": False})
    rows = Rows(tmp_path / "out")
    assert [int(row.document.max()) for row in rows] == [1] * 9


def test_a_long_document_is_split_and_told(tmp_path: Path, tokenizer: Any) -> None:
    text = sentence(1, 200)
    write_lines(tmp_path / "raw/a.jsonl", [{"text": text}])
    report = made(tmp_path, pack={"seq_len": 128})
    rows = Rows(tmp_path / "out")
    ids = [int(each) for row in rows for each in row.input_ids[row.document > 0]]
    assert report["rows"]["split"] == 1
    assert sorted(ids) == sorted([*tokenizer(text)["input_ids"], 1])


def test_a_long_document_is_dropped_with_its_reason_where_that_is_asked(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", [{"text": sentence(1, 200)}, {"text": sentence(2, 10)}])
    made(tmp_path, pack={"seq_len": 128, "long": "drop"})
    assert rules_of(tmp_path) == ["long"]
    assert len(Rows(tmp_path / "out")) == 1


def test_a_part_of_a_conversation_without_an_answer_is_no_row(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": sentence(3, 100)}, {"role": "assistant", "content": "Yes."}]
    write_lines(tmp_path / "raw/a.jsonl", [{"messages": talk}])
    made(tmp_path, pack={"seq_len": 128})
    assert all(row.learned.any() for row in Rows(tmp_path / "out"))
    assert set(rules_of(tmp_path)) == {"nothing_learned"}


def test_best_fit_decreasing_fills_the_row_with_the_least_room() -> None:
    assert best_fit([5, 3, 7, 4, 1], 10) == [[2, 1], [0, 3, 4]]


def test_no_row_is_over_full_and_none_could_take_another_whole_one() -> None:
    lengths = [(number * 7919) % 97 + 1 for number in range(500)]
    rows = best_fit(lengths, 100)
    assert sorted(piece for row in rows for piece in row) == list(range(500))
    used = sorted(sum(lengths[piece] for piece in row) for row in rows)
    assert used[-1] <= 100
    assert used[0] + used[1] > 100


def test_the_rows_name_the_tokenizer_and_another_one_is_not_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", [{"text": sentence(1)}])
    made(tmp_path)
    assert Rows(tmp_path / "out").tokenizer == tokenizer_digest(tmp_path / "tokenizer")


def test_a_changed_tokenizer_makes_the_tokens_again(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", [{"messages": TALK}])
    made(tmp_path)
    before = Rows(tmp_path / "out").digest
    template = (tmp_path / "tokenizer/chat_template.jinja").read_text()
    (tmp_path / "tokenizer/chat_template.jinja").write_text(
        "<|im_start|>system\nBe kind.<|im_end|>\n" + template
    )
    made(tmp_path)
    assert Rows(tmp_path / "out").digest != before


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", [{"text": sentence(1)}])
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(Refusal, match="has no tokenizer"):
        made(tmp_path)
