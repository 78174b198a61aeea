"""The hardware that a job runs on: as given on the command line, or as detected on this machine."""

import os
from dataclasses import dataclass
from pathlib import Path

from llmcore.sizes import parse_memory
from llmtrain.exits import Refusal

G = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU model, by its data sheet."""

    memory: int  # GiB
    teraflops: float  # dense matrix products in bf16, or fp16 where there is no bf16
    bf16: bool
    link: float  # GB/s in one direction, to the other GPUs of the node


CARDS = {
    "a100": Card(80, 312, True, 300),
    "a800": Card(80, 312, True, 200),
    "h100": Card(80, 989, True, 450),
    "h800": Card(80, 989, True, 200),
    "h200": Card(140, 989, True, 450),
    "h20": Card(96, 148, True, 450),
    "b200": Card(180, 2250, True, 900),
    "l40s": Card(48, 362, True, 32),
    "l4": Card(24, 121, True, 32),
    "a10": Card(24, 125, True, 32),
    "a6000": Card(48, 155, True, 32),
    "4090": Card(24, 165, True, 32),
    "3090": Card(24, 71, True, 32),
    "v100": Card(32, 125, False, 150),
    "t4": Card(16, 65, False, 16),
}


@dataclass(frozen=True)
class Hardware:
    """`nodes` machines with `gpus` each; on a CPU, `gpus` is the number of processes. Sizes are bytes."""

    gpu: str  # a key of CARDS, "cpu", or the name from the driver
    gpus: int
    memory: int  # of one GPU; on a CPU, the share of one process
    host_memory: int  # of a node
    nodes: int = 1
    network: float = 12.5  # GB/s from a node to the others; the default assumes 100 Gbit/s

    @property
    def world_size(self) -> int:
        """The number of processes on all nodes."""
        return self.gpus * self.nodes

    @property
    def card(self) -> Card | None:
        """The data sheet of the GPU; None if it is not in CARDS."""
        return CARDS.get(self.gpu)

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.gpu == "cpu"

    @property
    def bf16(self) -> bool:
        """Whether the matrix units support bf16."""
        return self.card.bf16 if self.card else not self.on_cpu


def hardware_of(
    gpu: str,
    gpus: int,
    memory: str | None = None,
    nodes: int = 1,
    host_memory: str | None = None,
    network: float = 12.5,
) -> Hardware:
    """The hardware that the arguments describe; raises Refusal or ConfigError."""
    if gpu not in CARDS:
        raise Refusal(f"--gpu is '{gpu}': choose from {', '.join(CARDS)}; for a CPU omit --gpu")
    if gpus < 1 or nodes < 1:
        raise Refusal(f"--gpus is {gpus} and --nodes is {nodes}: both must be at least 1")
    size = parse_memory(memory) if memory else CARDS[gpu].memory * G
    # Nodes typically have twice the memory of their GPUs.
    host = parse_memory(host_memory, "--host-memory") if host_memory else 2 * size * gpus
    return Hardware(gpu, gpus, size, host, nodes, network)


def detect(nodes: int = 1, processes: int | None = None) -> Hardware:
    """`nodes` machines like this one. Imports torch. Raises Refusal if there are fewer GPUs than `processes`."""
    import torch

    host = machine_memory()
    if not torch.cuda.is_available():
        count = processes or 1
        return Hardware("cpu", count, host // count, host, nodes)
    available = torch.cuda.device_count()
    if processes is not None and processes > available:
        raise Refusal(
            f"scale.processes is {processes}, but this machine has {available} GPUs: use at most {available}"
        )
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(available))
    return Hardware(card_name(torch.cuda.get_device_name(0)), processes or available, memory, host, nodes)


def card_name(name: str) -> str:
    """The key in CARDS for a name from the driver, such as 'NVIDIA A100-SXM4-80GB'; unknown names are returned unchanged."""
    words = name.lower().replace("-", " ").split()
    return next((word for word in words if word in CARDS), name)


def machine_memory() -> int:
    """Bytes of memory of the machine, or the limit of the control group if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))
