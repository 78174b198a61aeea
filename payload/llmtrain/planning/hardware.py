"""What a job would run on: given by the person who plans, or found on this machine."""

import os
from dataclasses import dataclass
from pathlib import Path

from llmcore.sizes import parse_memory
from llmtrain.exits import Refusal

G = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's data sheet."""

    memory: int  # GiB
    teraflops: float  # dense matrix products in bf16, or fp16 where there is no bf16
    bf16: bool
    link: float  # GB/s in one direction, to the others of its node


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

    gpu: str  # a name in CARDS, "cpu", or what the driver calls it
    gpus: int
    memory: int  # of one GPU, or one process's share of the machine's
    host_memory: int  # of a node
    nodes: int = 1
    network: float = 12.5  # GB/s of a node to the others: 100 Gbit/s, assumed where nobody says

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.gpus * self.nodes

    @property
    def card(self) -> Card | None:
        """Its data sheet, where it is known."""
        return CARDS.get(self.gpu)

    @property
    def on_cpu(self) -> bool:
        """No GPU at all."""
        return self.gpu == "cpu"

    @property
    def bf16(self) -> bool:
        """Whether its matrix units compute in bf16."""
        return self.card.bf16 if self.card else not self.on_cpu


def given(
    gpu: str,
    gpus: int,
    memory: str | None = None,
    nodes: int = 1,
    host_memory: str | None = None,
    network: float = 12.5,
) -> Hardware:
    """Hardware that a person names. Raises Refusal or ConfigError."""
    if gpu not in CARDS:
        raise Refusal(f"--gpu is '{gpu}': known are {', '.join(CARDS)}; for a CPU leave --gpu out")
    if gpus < 1 or nodes < 1:
        raise Refusal(f"--gpus is {gpus} and --nodes is {nodes}: both must be at least 1")
    size = parse_memory(memory) if memory else CARDS[gpu].memory * G
    # A node with GPUs has about twice their memory; who knows better says so.
    host = parse_memory(host_memory, "--host-memory") if host_memory else 2 * size * gpus
    return Hardware(gpu, gpus, size, host, nodes, network)


def detect(nodes: int = 1, processes: int | None = None) -> Hardware:
    """This machine, `nodes` times. Imports torch. Raises Refusal where there are fewer GPUs than `processes`."""
    import torch

    host = machine_memory()
    if not torch.cuda.is_available():
        count = processes or 1
        return Hardware("cpu", count, host // count, host, nodes)
    found = torch.cuda.device_count()
    if processes is not None and processes > found:
        raise Refusal(
            f"scale.processes is {processes}, and this machine has {found} GPUs: take at most {found}"
        )
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(found))
    return Hardware(card_name(torch.cuda.get_device_name(0)), processes or found, memory, host, nodes)


def card_name(name: str) -> str:
    """'NVIDIA A100-SXM4-80GB' is an a100; a card that is not in CARDS keeps its name."""
    words = name.lower().replace("-", " ").split()
    return next((word for word in words if word in CARDS), name)


def machine_memory() -> int:
    """Bytes: what the machine has, or what its control group allows where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))
