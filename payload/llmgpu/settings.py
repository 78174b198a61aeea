"""The configuration of `llm-gpu`, which role gpu_health writes: /etc/llmkeep/gpu.yaml."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmcore.config import Section

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Profile = Annotated[
    str, Field(pattern=r"^[1-7]g\.\d+gb(\+[a-z.]+)?$")
]  # of a MIG instance: compute slices, memory
MIG_SLICES = 7  # of one GPU; which profiles fit beside each other beyond that, the driver knows

# By the name that NVML reports; from NVIDIA's data sheets. NVLinks only where the board always has them.
SKUS: dict[str, dict[str, Any]] = {
    "NVIDIA A100-SXM4-40GB": {"pcie_generation": 4, "pcie_width": 16, "nvlinks": 12, "ecc": True},
    "NVIDIA A100-SXM4-80GB": {"pcie_generation": 4, "pcie_width": 16, "nvlinks": 12, "ecc": True},
    "NVIDIA A100 80GB PCIe": {"pcie_generation": 4, "pcie_width": 16, "ecc": True},
    "NVIDIA H100 80GB HBM3": {"pcie_generation": 5, "pcie_width": 16, "nvlinks": 18, "ecc": True},
    "NVIDIA H100 PCIe": {"pcie_generation": 5, "pcie_width": 16, "ecc": True},
    "NVIDIA H200": {"pcie_generation": 5, "pcie_width": 16, "nvlinks": 18, "ecc": True},
    "NVIDIA L40S": {"pcie_generation": 4, "pcie_width": 16, "ecc": True},
    "NVIDIA GeForce RTX 4090": {"pcie_generation": 4, "pcie_width": 16},
}


class Expect(Section):
    """The expectations for each GPU of the host. Unset values come from `SKUS` by `name`; values missing there as well are not
    compared, except for PCIe, which is then compared with the maximum that the GPU reports. `mig_layout` lists the profiles of
    the MIG instances by GPU index; MIG is off on GPUs that it does not list.
    """

    count: Positive
    name: str | None = None
    pcie_generation: Positive | None = None
    pcie_width: Positive | None = None
    nvlinks: Annotated[int, Field(ge=0)] | None = None
    ecc: bool | None = None
    mig: bool | None = None
    persistence: bool | None = None
    power_limit_watts: Annotated[float, Field(gt=0)] | None = None
    compute_mode: Literal["default", "exclusive_process", "prohibited"] | None = None
    mig_layout: (
        dict[Annotated[int, Field(ge=0)], Annotated[tuple[Profile, ...], Field(min_length=1)]] | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def from_the_sku(cls, values: Any) -> Any:
        """Fill in the SKU's values."""
        if isinstance(values, dict) and isinstance(name := values.get("name"), str):
            return {**SKUS.get(name, {}), **values}
        return values

    @model_validator(mode="after")
    def possible_layout(self) -> "Expect":
        """A layout names only expected GPUs, and only as many instances as a GPU can hold."""
        if self.mig_layout is None:
            return self
        if self.mig is not None:
            raise ValueError("mig and mig_layout exclude each other: the layout says where MIG is on")
        for index, profiles in self.mig_layout.items():
            if index >= self.count:
                raise ValueError(
                    f"mig_layout names GPU {index}, but count is {self.count}: they count from 0"
                )
            if (slices := sum(int(profile[0]) for profile in profiles)) > MIG_SLICES:
                raise ValueError(
                    f"mig_layout of GPU {index} has {slices} compute slices: a GPU has {MIG_SLICES}"
                )
        return self

    def layout(self, index: int) -> tuple[str, ...] | None:
        """The profiles that a GPU is divided into, sorted; () if it is not, None if no layout is declared."""
        return None if self.mig_layout is None else tuple(sorted(self.mig_layout.get(index, ())))


class Served(Section):
    """An engine of this host: the socket by which gateways know it, and the indices of its GPUs.

    `unit`: what systemd runs it as; a change of MIG stops it, and starts it again.
    """

    socket: Path
    unit: str = ""
    gpus: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class GpuConfig(Section):
    """`llm-gpu --config`.

    A reading every `seconds`. Without one for `stale_seconds`, the GPUs' health is unknown and nothing is exported.
    An engine returns once its GPUs were healthy for `return_seconds`. `audit`: None on a host that only trains and has no record.
    `gateways`: the metrics ports on 127.0.0.1 of this host's gateways, which know when an engine is drained.
    """

    expect: Expect
    engines: dict[str, Served] = Field(default_factory=dict)
    audit: Path | None = Path("/run/llm-audit/audit.sock")
    state: Path = Path("/var/lib/llm-gpu/state.json")
    orders: Path = Path("/etc/llmkeep/gpu-orders.json")
    gateways: tuple[Annotated[int, Field(gt=0, le=65535)], ...] = ()
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9410
    seconds: Seconds = 10.0
    stale_seconds: Seconds = 30.0
    return_seconds: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def known_gpus(self) -> "GpuConfig":
        """An engine's GPUs are among those expected, and a reading is due before the last one is stale."""
        for name, served in self.engines.items():
            if wrong := [gpu for gpu in served.gpus if gpu >= self.expect.count]:
                raise ValueError(
                    f"engine '{name}' has GPU {wrong[0]}, but expect.count is {self.expect.count}: they count from 0"
                )
        if self.stale_seconds <= self.seconds:
            raise ValueError(
                f"stale_seconds ({self.stale_seconds:g}) must be above seconds ({self.seconds:g})"
            )
        return self
