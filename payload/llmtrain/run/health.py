"""Training health: gradient norms by kind of layer and by depth, and rules with advice.

The rules see numbers alone. Messages name a step and its position in the data, never the content of a batch. All ranks
pass in the same numbers, so all reach the same verdict.
"""

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, median, pvariance
from typing import Any, Literal

from llmtrain.exits import UNHEALTHY, Refusal
from llmtrain.job import Job

Level = Literal["ok", "warn", "stop"]
# Kinds of layers by parameter names in transformers' Llama, Qwen and DeepSeek models; the first match counts.
KINDS = {
    "adapter": re.compile(r"\blora_|modules_to_save"),
    "embedding": re.compile(r"embed_tokens|\bwte\b|word_embeddings"),
    "head": re.compile(r"\blm_head\b"),
    "norm": re.compile(r"norm[^.]*\.(weight|bias)$"),
    "experts": re.compile(r"experts?\b|\bgate\.(weight|e_score)"),
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|feed_forward|\bffn\b"),
    "other": re.compile(""),
}
BLOCK = re.compile(r"\b(?:layers|h|blocks)\.(\d+)\.")

REMEMBERED = 100  # steps of history
LOWEST_SCALE = 1.0  # of the loss in fp16; below 1, scaling no longer helps
SKIPPED = (
    8  # steps in a row that fp16 skipped; starting at 65536, a scale that suits most models is found sooner
)
EXPLODING = 10.0  # times the median norm
EXPLODED = 10  # such steps in a row
VANISHING = 1e-4  # of the median norm of the same kind of layer; healthy layers are above a hundredth
SMOOTHED = 20  # losses in a median, so that a single spike does not count
DIVERGING, DIVERGED = 0.5, 2.0  # nats above the lowest median loss
AGAIN = 100  # steps before a finding is reported again


@dataclass(frozen=True)
class Norms:
    """L2 norms of the gradients before clipping, by kind of layer and number of the block (-1: outside of blocks)."""

    cells: dict[tuple[str, int], float]

    @property
    def total(self) -> float:
        """The norm of all gradients."""
        return math.hypot(*self.cells.values())

    @property
    def kinds(self) -> dict[str, float]:
        """The norm of each kind of layer."""
        kinds = {kind: None for kind, _ in self.cells}
        return {
            kind: math.hypot(*(norm for (each, _), norm in self.cells.items() if each == kind))
            for kind in kinds
        }

    def facts(self) -> dict[str, float]:
        """The norms as metrics, such as `grad_norm_attention`."""
        return {f"grad_norm_{kind}": norm for kind, norm in self.kinds.items()}

    def vanishing(self) -> list[str]:
        """The layers whose gradient vanishes, compared with layers of the same kind in other blocks."""
        layers = []
        for kind in self.kinds:
            blocks = {block: norm for (each, block), norm in self.cells.items() if each == kind}
            usual = median(blocks.values())
            weak = [str(block) for block, norm in blocks.items() if norm < VANISHING * usual]
            if weak:
                layers.append(f"{kind} of block {', '.join(weak)} of {len(blocks)}")
            elif usual < VANISHING**2 * self.total:
                layers.append(f"{kind} everywhere")
        return layers


def kind_of(name: str) -> str:
    """The kind of layer of a parameter, a key of KINDS."""
    return next(kind for kind, pattern in KINDS.items() if pattern.search(name))


def gradient_norms(model: Any, scale: float = 1.0) -> Norms:
    """The norms of the trainable parameters' whole gradients under DDP, FSDP2, ZeRO-2 or ZeRO-3. All ranks call it, after
    the last backward pass of a step and before the optimizer's step.

    `scale` is the fp16 loss scale if gradients still carry it, as DeepSpeed's do.
    """
    import torch
    from torch.distributed.tensor import DTensor

    keys: list[tuple[str, int]] = []
    norms: list[Any] = []
    parts = False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient, is_part = _gradient(parameter)
        parts |= is_part
        block = BLOCK.search(name)
        keys.append((kind_of(name), int(block[1]) if block else -1))
        norm = torch.zeros(())
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).to(parameter.device))
    squares = torch.stack(norms).double().square() / scale**2
    if parts:
        torch.distributed.all_reduce(squares)
    cells = dict.fromkeys(keys, 0.0)
    for key, square in zip(keys, squares.tolist(), strict=True):
        cells[key] += square
    return Norms({key: math.sqrt(square) for key, square in cells.items()})


def _gradient(parameter: Any) -> tuple[Any, bool]:
    """The gradient of a parameter or this rank's shard of it, and whether it is a shard."""
    if "ds_id" in vars(parameter):  # ZeRO-3
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter), True
    if "_hp_mapping" in vars(parameter):  # ZeRO-1 and 2
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter), False
    return parameter.grad, False


@dataclass(frozen=True)
class Finding:
    """A rule that matched: its name, its severity, and a message with advice."""

    rule: str
    level: Level
    message: str


@dataclass(frozen=True)
class Verdict:
    """The findings of a step, and those of them that were not reported recently."""

    findings: list[Finding] = field(default_factory=list)
    news: list[Finding] = field(default_factory=list)

    @property
    def level(self) -> Level:
        """The highest severity among the findings."""
        levels = [finding.level for finding in self.findings]
        return "stop" if "stop" in levels else "warn" if levels else "ok"

    def refuse(self) -> None:
        """Raise Refusal (UNHEALTHY) if the training must stop."""
        stops = [finding.message for finding in self.findings if finding.level == "stop"]
        if stops:
            raise Refusal("; ".join(stops), UNHEALTHY)


class Health:
    """The history of a training that rules compare with. It is empty after a resume."""

    def __init__(self, job: Job, parameters: int, world_size: int, peak_flops: float | None = None) -> None:
        """`parameters` are those active for a token. `peak_flops` is the data-sheet value of one GPU for dense products in this
        precision; None if unknown."""
        self.job, self.world_size, self.peak_flops = job, world_size, peak_flops
        # Per parameter and token 2 forward and 4 backward; frozen weights need no gradient of their own (PaLM, appendix B).
        self.flops_a_token = (6 if job.method.kind == "full" else 4) * parameters
        self.norms: deque[float] = deque(maxlen=REMEMBERED)
        self.losses: deque[float] = deque(maxlen=2 * REMEMBERED)
        self.lowest = math.inf
        self.scales: list[tuple[int, float]] = []  # (step, scale) at each change
        self.skipped = self.exploded = 0
        self.last_steps: dict[str, int] = {}

    def speed(self, tokens: float, seconds: float) -> dict[str, float | None]:
        """Metrics of a step in which all ranks processed `tokens`; mfu is model FLOPs utilization, 0 to 1, or None."""
        rate = tokens / seconds
        one = rate / self.world_size
        mfu = one * self.flops_a_token / self.peak_flops if self.peak_flops else None
        return {"tokens_per_second": rate, "tokens_per_second_gpu": one, "mfu": mfu}

    def step(
        self,
        step: int,
        loss: float,
        norm: float,
        cursor: int,
        scale: float | None = None,
        norms: Norms | None = None,
    ) -> Verdict:
        """Judge a step by its mean loss over all ranks and its gradient norm before clipping. `cursor` is the number of rows
        taken before the step, `scale` the fp16 loss scale, `norms` the norms by layer if they were measured."""
        where = f"at step {step} (rows from {cursor} on, in the job's order)"
        findings = [
            *self._not_finite(where, loss, norm, scale),
            *self._scale(step, where, norm, scale),
            *self._exploding(where, norm),
            *self._vanishing(where, norms),
            *self._loss(where, loss),
        ]
        news = [each for each in findings if step - self.last_steps.get(each.rule, -AGAIN) >= AGAIN]
        self.last_steps |= {each.rule: step for each in news}
        return Verdict(findings, news)

    def _not_finite(self, where: str, loss: float, norm: float, scale: float | None) -> Iterable[Finding]:
        if not math.isfinite(loss):
            yield Finding(
                "loss_not_finite", "stop",
                f"{where} the loss is {loss}: inspect these rows, lower optim.lr ({self.job.optim.lr:g} now)"
                + (", use bf16" if scale is not None else "") + "; the last checkpoint precedes this step",
            )  # fmt: skip
        if scale is None and not math.isfinite(norm):
            yield Finding(
                "gradients_not_finite", "stop",
                f"{where} the gradient norm is {norm}: lower optim.lr ({self.job.optim.lr:g} now), and inspect these rows; "
                "the last checkpoint precedes this step",
            )  # fmt: skip

    def _scale(self, step: int, where: str, norm: float, scale: float | None) -> Iterable[Finding]:
        if scale is None:
            return
        if not self.scales or self.scales[-1][1] != scale:
            self.scales.append((step, scale))
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        trace = ", ".join(f"{value:g} at step {when}" for when, value in self.scales[-5:])
        if scale <= LOWEST_SCALE:
            yield Finding(
                "scale_collapsed", "stop",
                f"scale collapsed: {where} the fp16 loss scale is {scale:g} ({trace}), and gradients still overflow; "
                "set optim.precision to bf16 or fp32, or lower optim.lr",
            )  # fmt: skip
        elif self.skipped >= SKIPPED:
            yield Finding(
                "scale_falling", "warn",
                f"{where} fp16 has skipped {self.skipped} steps in a row ({trace}): the weights do not change; if this "
                "continues, use bf16",
            )  # fmt: skip

    def _exploding(self, where: str, norm: float) -> Iterable[Finding]:
        if not math.isfinite(norm):
            return
        usual = median(self.norms) if len(self.norms) >= SMOOTHED else None
        self.norms.append(norm)
        self.exploded = self.exploded + 1 if usual and norm > EXPLODING * usual else 0
        if self.exploded:
            yield Finding(
                "exploding", "stop" if self.exploded >= EXPLODED else "warn",
                f"{where} the gradient norm is {norm:.3g}, {norm / (usual or 1):.0f} times the median {usual:.3g}, for "
                f"{self.exploded} steps now: clipping at {self.job.optim.clip:g} limits a spike; if spikes are frequent, lower "
                "optim.lr or lengthen optim.warmup",
            )  # fmt: skip

    def _vanishing(self, where: str, norms: Norms | None) -> Iterable[Finding]:
        if norms is None or not math.isfinite(norms.total):
            return
        if norms.total == 0:
            yield Finding(
                "no_gradient", "warn",
                f"{where} all gradients are 0: the weights do not change; check that rows have positions where the loss counts",
            )  # fmt: skip
            return
        if layers := norms.vanishing():
            yield Finding(
                "vanishing", "warn",
                f"{where} gradients vanish in {'; '.join(layers)}: these layers do not change; check that their weights are not "
                "0, and use bf16 or fp32 if this is fp16",
            )  # fmt: skip

    def _loss(self, where: str, loss: float) -> Iterable[Finding]:
        if not math.isfinite(loss):
            return
        if not self.losses:
            self.lowest = loss
        self.losses.append(loss)
        if len(self.losses) < SMOOTHED:
            return
        now = median(list(self.losses)[-SMOOTHED:])
        self.lowest = min(self.lowest, now)
        above = now - self.lowest
        if above > DIVERGING:
            yield Finding(
                "diverging", "stop" if above > DIVERGED else "warn",
                f"{where} the median loss of {SMOOTHED} steps is {now:.3f}, it was down to {self.lowest:.3f}: lower optim.lr "
                f"({self.job.optim.lr:g} now) and resume from an earlier checkpoint",
            )  # fmt: skip
        if len(self.losses) == 2 * REMEMBERED:
            old, new = list(self.losses)[:REMEMBERED], list(self.losses)[REMEMBERED:]
            gain, noise = fmean(old) - fmean(new), math.sqrt((pvariance(old) + pvariance(new)) / REMEMBERED)
            if 0 <= above <= DIVERGING and gain < noise:
                yield Finding(
                    "plateau", "warn",
                    f"{where} the mean loss of {REMEMBERED} steps is {fmean(new):.3f}, of those before {fmean(old):.3f}: no gain "
                    f"beyond its noise ({noise:.3f}); stop here, or raise optim.lr",
                )  # fmt: skip
