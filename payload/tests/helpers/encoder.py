"""A tiny random BERT, as a model for embeddings."""

import json
from pathlib import Path
from typing import Any

from llmcore.manifest import write_manifest

TEXTS = ["the cat sat", "a much longer sentence about something else " * 3, "Über 東京"]


def make_encoder(directory: Path, pooling: str = "mean", width: int = 32) -> None:
    """Two layers of this width, and a WordPiece tokenizer that would truncate at 5 tokens if allowed."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    (directory / "1_Pooling").mkdir()
    modes = {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling == "cls"}
    (directory / "1_Pooling/config.json").write_text(json.dumps(modes))


def described(directory: Path) -> dict[str, Any]:
    """The engine's configuration."""
    write_manifest(directory, directory / "MANIFEST.sha256")
    manifest = str(directory / "MANIFEST.sha256")
    return {"driver": "embed", "path": str(directory), "manifest": manifest, "threads": 1}
