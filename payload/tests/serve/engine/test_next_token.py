"""The logits of one request's next token, without a model."""

import copy
from typing import Any

import pytest
from tiny import make_tokenizer

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")

from llmserve.api.errors import ApiError  # noqa: E402
from llmserve.engine.next_token import Grammars, NextToken, grammar_of  # noqa: E402
from llmserve.protocol import Generate  # noqa: E402

END = 1


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Grammars(tokenizer, len(tokenizer), [END])


def made(grammars: Grammars, **fields: Any) -> NextToken:
    """What these fields do, at temperature 1."""
    request = Generate(0, False, 10, extra=fields)
    ends = [] if fields.get("ignore_eos") else [END]
    name = "structured_outputs"
    matcher = grammars.matcher(grammar_of(request, name), name) if name in fields else None
    return NextToken(request, [3], ends, grammars.tokens.vocab_size, 1, matcher)


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [], "ignore_eos": True},
        {"structured_outputs": {"regex": "[0-9]+"}, "allowed_token_ids": [2]},
        {"allowed_token_ids": [END], "min_tokens": 3},
    ],
)
def test_fields_that_leave_no_token_end_the_request_and_no_batch(
    grammars: Grammars, fields: dict[str, Any]
) -> None:
    change, logits = made(grammars, **fields), torch.randn(grammars.tokens.vocab_size)
    assert torch.equal(change([], logits), logits)
    assert isinstance(change.trouble, ApiError)
    assert change.trouble.status == 400


def test_a_copy_of_a_requests_arguments_goes_on_with_its_answer(grammars: Grammars) -> None:
    change = made(grammars, structured_outputs={"regex": "x*"})
    assert copy.deepcopy({"change": change})["change"] is change
