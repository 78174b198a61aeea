"""Activation memory: the tensors that a forward pass saves for the backward pass, counted rather than estimated.

The model runs on the meta device, where tensors have no data, and autograd passes each tensor it saves to a hook. Attention
is the exception: it counts as a fused kernel (FlashAttention, Dao et al. 2022), which saves query, key, value and output.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from llmtrain.planning.architecture import Architecture, outline

TOKENS = 256  # length of the row that is tried; saved bytes grow linearly with it
IMPLEMENTATION = "outlined"


@dataclass(frozen=True)
class Activations:
    """Saved bytes per token."""

    boundary: int  # the input of a layer, which is all that activation checkpointing keeps
    layers: tuple[int, ...]
    outside: int  # embedding, last norm, logits as the loss sees them


def activations(
    architecture: Architecture, targets: list[str] | None, dtype: str, rank: int = 16, dropout: float = 0.1
) -> Activations:
    """Count them for LoRA on `targets`, or for full fine-tuning if that is None; `dtype` is bf16, fp16 or fp32."""
    import torch

    number = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    # A target with a dot may select single layers; otherwise all layers after the first ones are alike.
    one_by_one = any("." in name for name in targets or [])
    tried = architecture.layers if one_by_one else min(architecture.layers, architecture.first_layers + 2)
    model = outlined(shortened(architecture.config, tried), number, architecture.expert_parameters > 0)
    if targets is not None:
        from llmcore.uncompiled import uncompiled

        with uncompiled():
            from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()  # as in training: checkpointing needs it
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets)
        model = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model
    model.train()
    place, sizes = ["outside"], {"outside": 0}
    # A storage counts once for all its views, weights not at all. Tensors are held so that no address is reused.
    storages: dict[int, Any] = {
        each.untyped_storage()._cdata: each for each in (*model.parameters(), *model.buffers())
    }

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = tensor
            sizes[place[0]] = sizes.get(place[0], 0) + storage.nbytes()
        return tensor

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(moves(place, str(index)))
        layer.register_forward_hook(moves(place, "outside"))
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), one_expert():
        model(input_ids=ids, use_cache=False)
    return Activations(
        boundary=architecture.hidden_size * number.itemsize,
        layers=tuple(
            sizes.get(str(min(index, tried - 1)), 0) // TOKENS for index in range(architecture.layers)
        ),
        outside=sizes["outside"] // TOKENS,
    )


def one_expert() -> Any:
    """In this context, torch's grouped product over experts is a product with one expert, which saves as much.

    On the meta device torch 2.13 supports it for bf16 alone, though its kernels support other dtypes. If torch has no such
    product, transformers uses its own, which is left unchanged.
    """
    from torch.overrides import TorchFunctionMode

    class OneExpert(TorchFunctionMode):  # type: ignore[misc]  # torch has no types here
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.__name__ in ("grouped_mm", "_grouped_mm"):
                rows, experts = args
                return rows @ experts[0]
            return function(*args, **(kwargs or {}))

    return OneExpert()


def moves(place: list[str], to: str) -> Callable[..., None]:
    """A hook that records in `place` where the forward pass is."""

    def hook(*_: Any) -> None:
        place[0] = to

    return hook


def shortened(config: Any, layers: int) -> Any:
    """The configuration of the model cut to its first `layers` layers."""
    short, all_layers = deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == all_layers:  # a list with an entry per layer
            setattr(short, name, value[:layers])
    short.num_hidden_layers = layers
    return short


def outlined(config: Any, dtype: Any, experts: bool) -> Any:
    """The model on the meta device, with the fused attention of this module and grouped experts."""
    from torch.autograd import Function
    from transformers import AttentionInterface

    class Kernel(Function):  # type: ignore[misc]  # torch has no types here
        """Saves the tensors that a fused attention saves. It has no backward pass."""

        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            rows, heads, tokens, _ = query.shape
            out = value.new_empty(rows, tokens, heads, value.shape[-1])
            ctx.save_for_backward(query, key, value, out)
            return out

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        # A packed row has a mask; then keys and values are copied for each head that shares them.
        copies = query.shape[1] // key.shape[1]
        if copies > 1:
            key, value = (each.repeat_interleave(copies, dim=1) for each in (key, value))
        return Kernel.apply(query, key, value), None

    AttentionInterface.register(IMPLEMENTATION, attention)
    options = {"experts_implementation": "grouped_mm"} if experts else {}
    return outline(config, dtype=dtype, attn_implementation=IMPLEMENTATION, **options)
