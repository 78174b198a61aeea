"""The random state of dropout, which is separate for each rank."""

from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors.torch import load_file, save_file


def write_random_state(folder: Path, device: torch.device) -> None:
    """Write this rank's file of a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    save_file(states, folder / f"rng-{distributed.get_rank():05d}.safetensors")


def read_random_state(folder: Path, device: torch.device, world_size: int) -> str:
    """Restore the state that `world_size` ranks wrote, if the same number runs now; else return what is lost, or ""."""
    if world_size != distributed.get_world_size():
        return "the random state of dropout"
    states = load_file(folder / f"rng-{distributed.get_rank():05d}.safetensors")
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    return ""
