"""The architecture of a model, from its config.json: `llm-train describe`.

The model is built on the meta device, where tensors have shapes but no data, so the answers come from the layers that will
run rather than from a table of module names. Needs transformers; reads no weights and runs no code from the model's folder.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from llmcore import model_config
from llmtrain.exits import DONE, Refusal
from llmtrain.job import Intent

# Llama-like models, and DeepSeek's latent attention. Other families have not been tried.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3")
# Linear layers that stay unquantized: the head, which transformers skips, and the decompression of MLA, whose
# four-dimensional input breaks the int8 product of bitsandbytes.
NEVER_QUANTIZED = ("lm_head", "kv_b_proj")
# vLLM absorbs this layer's weights into others; an adapter on it loads, but has no effect (vLLM #48974).
ABSORBED = "kv_b_proj"
# On a model with experts PEFT 0.21 mistakes these names, with any prefix, for the experts' fused weights
# (transformers_weight_conversion.py), where it allows no dropout.
FUSED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """The shapes of a model. Parameters are counts; tied weights count once."""

    family: str
    parameters: int
    active_parameters: int  # for one token: of the routed experts, only those that the router selects
    expert_parameters: int  # fused in three dimensions; neither bitsandbytes nor LoRA applies to them
    router_parameters: int
    layers: int
    first_layers: int  # dense layers before those with experts
    heads: int
    hidden_size: int
    vocabulary: int
    context: int
    leaf_classes: tuple[str, ...]  # modules that ZeRO-3 has to gather as one
    quantizable_parameters: int
    quantizable_rows: int
    largest_layer: int  # parameters of the largest decoder layer
    largest_unit: int  # parameters of the largest module that ZeRO-3 gathers as one
    largest_parameter: int
    outside_layers: int  # parameters of embeddings, head and final norm
    widest: int  # elements per token of the widest product in a layer
    stored_as: str  # dtype of the weights on disk; "fp8" cannot be trained
    linears: dict[str, tuple[int, int]] = field(repr=False)  # full name: inputs, outputs
    config: Any = field(repr=False, compare=False)  # of transformers

    @property
    def latent(self) -> bool:
        """Whether attention uses compressed keys and values (MLA)."""
        return any(name.endswith(f".{ABSORBED}") for name in self.linears)

    @property
    def quantizable_share(self) -> float:
        """The share of the bytes in 16 bit that bitsandbytes can quantize, from 0 to 1."""
        return self.quantizable_parameters / self.parameters

    def served_unmerged(self, targets: list[str]) -> bool:
        """Whether a server can apply an adapter on `targets` unmerged."""
        return not any(name.split(".")[-1] == ABSORBED for name in matching(self, targets))


def describe(model_dir: Path) -> Architecture:
    """The architecture of the model in `model_dir`, from its config.json alone.

    Raises ConfigError if there is no config.json, and Refusal for a model that transformers has no class for, or whose
    family is not in FAMILIES.
    """
    content = model_config.read(model_dir)
    refuse_the_unknown(model_dir, content)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        model = outline(config)
        return inspect(config, content, model)
    except Refusal:
        raise
    except Exception as error:  # transformers does not validate: the error may be any
        raise Refusal(
            f"cannot build a model from {model_dir}/config.json ({type(error).__name__}: {error}): compare it with the original"
        ) from error


def refuse_the_unknown(model_dir: Path, content: dict[str, Any]) -> None:
    """Raise Refusal for a family that is not in FAMILIES."""
    family = content.get("model_type")
    if family == "deepseek":
        raise Refusal(
            f"{model_dir} is a first-generation DeepSeek mixture of experts (model_type 'deepseek'), which needs code "
            "from its own directory, which is never run: use DeepSeek-V2-Lite or another native model"
        )
    if family not in FAMILIES:
        raise Refusal(f"{model_dir} has model_type {family!r}: llm-train supports {', '.join(FAMILIES)}")


def outline(config: Any, **options: Any) -> Any:
    """The model of a configuration on the meta device, where its weights have no data."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    # Import the class first: the import creates tensors that must not be on the meta device.
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def inspect(config: Any, content: dict[str, Any], model: Any) -> Architecture:
    """The architecture of a model on the meta device."""
    from torch.nn import Linear

    modules = dict(model.named_modules())
    linears = {name: part for name, part in modules.items() if isinstance(part, Linear)}
    mixtures = [part for part in modules.values() if "experts" in dict(part.named_children())]
    experts = sum(size(part.experts) for part in mixtures)
    routed = getattr(config, "num_experts_per_tok", None) or 0
    idle = sum(size(part.experts) * (1 - routed / part.experts.num_experts) for part in mixtures)
    quantized = [part for name, part in linears.items() if name.split(".")[-1] not in NEVER_QUANTIZED]
    layers = [size(layer) for layer in model.model.layers]
    parameters = size(model)
    fused = [part.experts.gate_up_proj.shape[1] * routed for part in mixtures]
    stored = (content.get("quantization_config") or {}).get("quant_method")
    return Architecture(
        family=config.model_type,
        parameters=parameters,
        active_parameters=round(parameters - idle),
        expert_parameters=experts,
        router_parameters=sum(size(part.gate) for part in mixtures),
        layers=len(layers),
        first_layers=getattr(config, "first_k_dense_replace", 0) if mixtures else 0,
        heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        leaf_classes=tuple(sorted({type(part).__name__ for part in mixtures})),
        quantizable_parameters=sum(part.weight.numel() for part in quantized),
        quantizable_rows=sum(part.out_features for part in quantized),
        largest_layer=max(layers),
        largest_unit=max(
            *(size(part) for part in mixtures),
            *(sum(each.numel() for each in part.parameters(recurse=False)) for part in modules.values()),
        ),
        largest_parameter=max(each.numel() for each in model.parameters()),
        outside_layers=parameters - sum(layers),
        widest=max(*fused, *(part.out_features for name, part in linears.items() if name != "lm_head")),
        stored_as=str(stored or config.dtype or "unsaid").removeprefix("torch."),
        linears={name: (part.in_features, part.out_features) for name, part in linears.items()},
        config=config,
    )


def size(module: Any) -> int:
    """The number of parameters of a module; tied ones count once."""
    return sum(each.numel() for each in module.parameters())


def lora_targets(architecture: Architecture, target: str | list[str]) -> list[str]:
    """Names of the Linear layers to adapt, as PEFT's `target_modules` takes them.

    `target` is an intent, or names that match as in PEFT: a full name, or its end after a dot. Raises Refusal if a name
    matches no Linear layer: PEFT would silently train only the others.
    """
    if isinstance(target, list):
        return require_layers(architecture, target)
    attention = sorted({name.split(".")[-1] for name in architecture.linears if ".self_attn." in name})
    if target == "linear":
        return require_layers(
            architecture, sorted({name.split(".")[-1] for name in architecture.linears} - {"lm_head"})
        )
    if target == "attention.all":
        return attention
    # Queries and values. Latent attention decompresses values by kv_b_proj, and queries by q_b_proj where they are
    # compressed.
    query = "q_b_proj" if "q_b_proj" in attention else "q_proj"
    return require_layers(architecture, [query, ABSORBED if ABSORBED in attention else "v_proj"])


def require_layers(architecture: Architecture, names: list[str]) -> list[str]:
    """Return `names`; raises Refusal if some match no Linear layer, or fused experts."""
    missing = [name for name in names if not matching(architecture, [name])]
    if not names or missing:
        there = sorted({name.split(".")[-1] for name in architecture.linears})
        raise Refusal(
            f"method.target {target_text(names)} does not fit a {architecture.family} model: no Linear layer is called "
            f"{' or '.join(missing) or '(the list is empty)'}; there are {', '.join(there)}; or use an intent, "
            f"{', '.join(get_args(Intent))}"
        )
    fused = [name for name in names if name.split(".")[-1] in FUSED]
    if architecture.expert_parameters and fused:
        raise Refusal(
            f"method.target {target_text(names)} cannot be adapted on a {architecture.family} model: PEFT mistakes "
            f"{', '.join(fused)} for the fused experts, which do not support dropout; use attention.all"
        )
    return names


def target_text(names: list[str]) -> str:
    """The target as it is written in a job file."""
    return f"[{', '.join(names)}]"


def matching(architecture: Architecture, names: list[str]) -> list[str]:
    """The full names of the Linear layers that PEFT adapts for `names`."""
    return [
        full
        for full in architecture.linears
        if any(full == name or full.endswith(f".{name}") for name in names)
    ]


def adapter_parameters(architecture: Architecture, targets: list[str], rank: int) -> int:
    """The number of parameters of LoRA on `targets`: per layer, matrices of inputs × rank and rank × outputs."""
    shapes = [architecture.linears[name] for name in matching(architecture, targets)]
    return rank * sum(inputs + outputs for inputs, outputs in shapes)


def intents(architecture: Architecture) -> dict[str, list[str] | str]:
    """The layers that each intent selects in this architecture, or the message that refuses it."""
    selections: dict[str, list[str] | str] = {}
    for intent in get_args(Intent):
        try:
            selections[intent] = lora_targets(architecture, intent)
        except Refusal as refusal:
            selections[intent] = str(refusal)
    return selections


def as_json(architecture: Architecture) -> dict[str, Any]:
    """The output of `describe --json`."""
    shapes = (
        "family", "parameters", "active_parameters", "expert_parameters", "router_parameters", "layers", "hidden_size",
        "vocabulary", "context", "leaf_classes", "stored_as",
    )  # fmt: skip
    lora: dict[str, Any] = {}
    for intent, targets in intents(architecture).items():
        if isinstance(targets, str):
            lora[intent] = {"refused": targets}
        else:
            lora[intent] = {
                "targets": targets,
                "parameters_at_rank_16": adapter_parameters(architecture, targets, 16),
                "served_unmerged": architecture.served_unmerged(targets),
            }
    share = round(architecture.quantizable_share, 4)
    return {
        **{name: getattr(architecture, name) for name in shapes},
        "quantizable_share": share,
        "lora": lora,
    }


def text(architecture: Architecture) -> str:
    """The output of `describe`."""
    a = architecture
    lines = [
        f"{a.family}, {a.parameters / 1e9:.2f} G parameters, {a.active_parameters / 1e9:.2f} G active for a token",
        f"{a.layers} layers, width {a.hidden_size}, vocabulary {a.vocabulary}, context {a.context}, stored as {a.stored_as}",
    ]
    for intent, targets in intents(a).items():
        if isinstance(targets, str):
            lines.append(f"LoRA {intent:13} refused: {targets}")
            continue
        count = adapter_parameters(a, targets, 16) / 1e6
        served = "" if a.served_unmerged(targets) else "; merge it before it is served (vLLM #48974)"
        lines.append(f"LoRA {intent:13} {', '.join(targets)}: {count:.2f} M at rank 16{served}")
    lines.append(f"ZeRO-3 leaf classes: {', '.join(a.leaf_classes) or 'none: no experts'}")
    lines.append(f"quantizable by bitsandbytes: {a.quantizable_share:.0%} of the bytes")
    if a.expert_parameters:
        lines[-1] += f"; the experts, {a.expert_parameters / a.parameters:.0%}, stay in 16 bit"
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "describe", help="show the architecture of a model, and the layers that a job can target"
    )
    command.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="a directory with config.json")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=describe_command)


def describe_command(options: argparse.Namespace) -> int:
    """Print the architecture; raises ConfigError or Refusal."""
    architecture = describe(options.model_dir)
    print(json.dumps(as_json(architecture)) if options.json else text(architecture))
    return DONE
