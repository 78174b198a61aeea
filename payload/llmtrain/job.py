"""The schema of `job.yaml`, a training job. The defaults are those of the guide that this project follows."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llmcore.config import Section

Share = Annotated[float, Field(ge=0, le=1)]
Intent = Literal["attention.qv", "attention.all", "linear"]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), on the layers that `target` selects in this architecture."""

    kind: Literal["lora"]
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Share = 0.1
    target: Intent | list[str] = "attention.qv"  # or module names, each of which has to exist
    quantize: Literal["none", "int8", "nf4"] = "none"  # of the frozen base: QLoRA


class Full(Section):
    """Full fine-tuning: all weights are trainable."""

    kind: Literal["full"]
    train_router: bool = False  # of a mixture of experts; without a balance loss it drifts


class Data(Section):
    """Data sets that `llm-train data` packed."""

    train: Path
    eval: Path | None = None
    verify: bool = True  # check the hash of every shard before the first step


class Optim(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 3e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.1  # of all steps
    epochs: PositiveFloat = 1.0
    steps: PositiveInt | None = None  # instead of epochs
    weight_decay: float = Field(0.0, ge=0)
    beta1: Share = 0.9
    beta2: Share = 0.999
    clip: PositiveFloat = 1.0  # of the gradients' global norm
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    patience: PositiveInt | None = None  # evaluations without improvement after which the job ends


class Scale(Section):
    """How the job is distributed; `llm-train plan` decides what is auto, and gives its reasons."""

    strategy: Literal["auto", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    offload: Literal["auto", "none", "optimizer", "all"] = "auto"
    nodes: PositiveInt = 1
    processes: PositiveInt | None = None  # per node; default: its GPUs, or 1
    micro_batch: PositiveInt | None = None  # rows in one forward pass of a process
    tokens_per_step: PositiveInt = 524288  # over all processes and accumulation steps
    checkpointing: bool | Literal["auto"] = "auto"  # of activations


class Keep(Section):
    """When checkpoints are saved, and how many are kept."""

    every_steps: PositiveInt | None = None
    every_minutes: PositiveFloat = 30.0
    last: PositiveInt = 3  # older ones are deleted


class Watch(Section):
    """Logging, evaluation and metrics."""

    log_every: PositiveInt = 10  # steps
    eval_every: PositiveInt | None = None  # steps; default: at each checkpoint
    metrics: Path | None = None  # a file for Prometheus' textfile collector


class Preference(Section):
    """How answers are compared, where the data set's rows are for DPO or KTO."""

    beta: PositiveFloat = 0.1  # the higher, the closer to the model before training
    desirable_weight: PositiveFloat = 1.0  # KTO: of good answers
    undesirable_weight: PositiveFloat = 1.0


class Job(Section):
    """One training run. It writes to `output` alone."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    owner: str | None = None  # the user who submitted it, as `llm-train submit` found out
    model: Path  # local; safetensors only
    manifest: Path | None = None  # of the model, in the format of sha256sum; default: MODEL.sha256 beside it
    method: Lora | Full = Field(discriminator="kind")
    data: Data
    output: Path
    optim: Optim = Optim()
    preference: Preference | None = None  # None: its defaults, where the data needs it
    scale: Scale = Scale()
    keep: Keep = Keep()
    watch: Watch = Watch()
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def quantized_weights_are_not_sharded(self) -> "Job":
        """Under ZeRO-3 every rank would load the whole quantized model first, and bitsandbytes' blocks cannot be sharded."""
        if (
            self.method.kind == "lora"
            and self.method.quantize != "none"
            and self.scale.strategy in ("zero3", "fsdp")
        ):
            raise ValueError(
                f"method.quantize {self.method.quantize} cannot be sharded by {self.scale.strategy}: "
                "use ddp or zero2, or omit quantize"
            )
        return self
