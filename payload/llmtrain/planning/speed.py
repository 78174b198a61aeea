"""Predicted training speed, from published figures. Nothing here was measured by us on a GPU.

A token costs 6 operations per active parameter, or 4 if the weights are frozen, since they need no gradient. The share of a
GPU's peak that is achieved (model FLOPs utilization, MFU) is that of the most similar published run.
"""

from llmtrain.planning.footprint import Choice, Load, gathered

# MFU without activation checkpointing, and its source.
FULL_AMPERE = (0.642, "MPT-7B, 8×A100-80, FSDP: 64.2 % (llm-foundry)")
FULL_HOPPER = (0.464, "MPT-7B, 8×H100: 46.4 % (llm-foundry)")
LORA = (0.26 / 0.79, "Llama-2-7B LoRA with checkpointing, one A100: 26 % (LLaMA-Factory)")
LORA_HOPPER = (0.178 / 0.79, "Llama-3-70B LoRA, 8×H100: 17.8 % (NeMo AutoModel)")
EXPERTS = (0.25 / 0.79, "DeepSeek-V3, 256×H100: 25 % (NeMo AutoModel)")
CHECKPOINTING = 0.79  # torchtune's ablation: activation checkpointing costs 21 % of the speed
PCIE = 20e9  # bytes a second between a GPU and its host, assumed
CPU_ADAM = (
    1.4e-9  # seconds a parameter: PyTorch's AdamW on a CPU, 1 G parameters (ZeRO-Offload, Ren et al. 2021)
)


def anchor(load: Load) -> tuple[float, str]:
    """The MFU of the most similar published run, and its source."""
    hopper = load.hardware.gpu.startswith(("h", "b"))
    if load.architecture.expert_parameters:
        return EXPERTS
    if load.job.method.kind == "lora":
        return LORA_HOPPER if hopper else LORA
    return FULL_HOPPER if hopper else FULL_AMPERE


def tokens_per_second(load: Load, choice: Choice, accumulation: int) -> float | None:
    """Tokens per second of all processes together; None on a CPU or an unknown GPU, for lack of published figures."""
    card, world = load.hardware.card, load.hardware.world_size
    if card is None:
        return None
    tokens = choice.micro_batch * load.seq_len
    operations = (6 if load.job.method.kind == "full" else 4) * load.architecture.active_parameters
    mfu = anchor(load)[0] * (CHECKPOINTING if choice.checkpointing else 1)
    compute = operations * tokens / (card.teraflops * 1e12 * mfu)
    within, between = link_seconds(load, choice)
    # Without prefetching, communication and computation do not overlap.
    waits = choice.strategy == "zero3" and load.architecture.expert_parameters
    micro = compute + within if waits else max(compute, within)
    return world * tokens * accumulation / (accumulation * micro + between)


def link_seconds(load: Load, choice: Choice) -> tuple[float, float]:
    """Seconds of communication per micro-batch, and per step."""
    hardware, world, number, learn = load.hardware, load.hardware.world_size, load.number, load.trainable
    card = hardware.card
    assert card is not None  # noqa: S101  the caller checks
    full = load.job.method.kind == "full"
    speed = card.link * 1e9 if hardware.nodes == 1 else min(card.link, hardware.network) * 1e9
    others = (world - 1) / world
    passes = 2 + choice.checkpointing
    stored = load.frozen_bytes + (learn * number if full else 0)
    micro = step = 0.0
    if choice.sharded:
        micro += passes * stored * others / speed + learn * number * others / speed
    elif choice.strategy == "zero2":
        micro += learn * number * others / speed
        step += learn * number * others / speed
    else:
        step += 2 * learn * 4 * others / speed
    if choice.offload == "all":
        micro += passes * stored / world / PCIE
    if choice.offload != "none":
        step += learn / hardware.nodes * CPU_ADAM + 2 * learn * number / world / PCIE
    return micro, step


def describes(load: Load, choice: Choice) -> str:
    """The basis of the prediction, in a sentence."""
    sentence = f"speed is predicted from a published figure ({anchor(load)[1]}), not measured here"
    if choice.sharded and gathered(load, choice) and load.hardware.nodes > 1:
        sentence += f"; {load.hardware.network:g} GB/s between nodes is " + (
            "assumed" if load.hardware.network == 12.5 else "given"
        )
    return sentence
