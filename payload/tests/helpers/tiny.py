"""Models small enough to create in a test, with a byte-level tokenizer and a chat template."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(directory: Path) -> Any:
    """A token for each byte, some more, and the two that frame a message."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what is the capital of France? hello you " * 5], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return fast


def make_model(directory: Path, dtype: Any = torch.bfloat16, **size: int) -> None:
    """A random Llama, with two layers by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = make_tokenizer(directory)
    torch.manual_seed(0)
    small = {
        "vocab_size": len(fast),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **{**small, **size},
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)


def make_deepseek(directory: Path, version: int = 2, dtype: Any = torch.float32, **size: Any) -> None:
    """A random DeepSeek-V2 or V3: latent attention, one dense layer, and one layer with eight experts."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

    fast = make_tokenizer(directory)
    torch.manual_seed(0)
    small = {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    if version == 2:
        config = DeepseekV2Config(
            vocab_size=len(fast), topk_method="greedy", n_group=1, topk_group=1, **{**small, **size}
        )
        model = DeepseekV2ForCausalLM(config)
    else:
        config = DeepseekV3Config(vocab_size=len(fast), n_group=2, topk_group=1, **{**small, **size})
        model = DeepseekV3ForCausalLM(config)
    model.to(dtype).save_pretrained(directory)


def make_reciter(directory: Path, text: str) -> None:
    """A Llama that answers each prompt with `text`, byte by byte, and ends. No byte may occur twice.

    Its single layer adds nothing, each token has its own direction, and the head maps it to the next token.
    """
    fast, model = one_layer(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        recite(fast, model, text)
    model.save_pretrained(directory)


def make_undecided(directory: Path, often: str, seldom: str) -> None:
    """A Llama as that of `make_reciter` that answers with one of two texts, and can learn which: its layer adds little, but can
    be adapted, and the last hidden dimension, which is 0 before, tells the texts apart.
    """
    torch.manual_seed(0)
    fast, model = one_layer(directory)
    with torch.no_grad():
        layer = model.model.layers[0]
        for parameter in layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight:
            parameter.mul_(0.05)
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for text, weight, side in ((often, 1.04, -10), (seldom, 1, 10)):
            first = recite(fast, model, text)
            model.lm_head.weight[first].fill_(weight)
            model.lm_head.weight[first, -1] = side
    model.save_pretrained(directory)


def one_layer(directory: Path) -> tuple[Any, Any]:
    """Tokenizer and model in which each token can have a dimension of its own; the tokenizer is saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = make_tokenizer(directory)
    size = 448  # at least the vocabulary, and a multiple of 64
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=size, intermediate_size=64, num_hidden_layers=1, num_attention_heads=7,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return fast, LlamaForCausalLM(config)


def recite(fast: Any, model: Any, text: str) -> int:
    """Have each token of `text` followed by the next one, and the last by the end; returns the first."""
    spoken = [token for each in text.encode() for token in fast.convert_tokens_to_ids([byte_token(each)])]
    if len(set(spoken)) != len(spoken):
        raise ValueError(f"a byte occurs twice in {text!r}")
    model.model.embed_tokens.weight[:, : len(fast)].copy_(torch.eye(len(fast)))
    model.lm_head.weight[spoken[0]].fill_(1)  # after any token outside of the text
    for before, after in zip(spoken, [*spoken[1:], 1], strict=True):
        model.lm_head.weight[after, before] += 2
    return int(spoken[0])


def byte_token(value: int) -> str:
    """The character that represents a byte in a byte-level tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return str(bytes_to_unicode()[value])
