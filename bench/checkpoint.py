"""Compares the cost of a verified checkpoint with a plain save of the same state to the same disk, in turns.

The state is as big as that of SmolLM2-135M in full fine-tuning: float32 weights and AdamW's two moments (1.6 GB), random.
A plain save is `safetensors` or `torch.save`, an fsync of file and folder, and the removal of the previous save. A verified one
is `Checkpoints.save` with the same writer: it also hashes, authenticates and renames. Before each one the disk is idle (`sync`,
not counted). `alone` is the time of sha256 by itself.

    payload/.venv/bin/python bench/checkpoint.py [--rounds 5] [--folder DIR] [--json FILE]

Needs `make env` and 5 GB in the folder. Exit code 0, or 1 if the median ratio of a writer is above the goal of 1.15.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llmtrain.run import sealed
from llmtrain.run.checkpoint import Checkpoints
from safetensors.torch import save_file

from llmcore.files import flush

GOAL = 1.15
HIDDEN, INTERMEDIATE, LAYERS, KEY_VALUE, VOCABULARY = 576, 1536, 30, 192, 49152  # SmolLM2-135M's
KEY = os.urandom(32)


def state(layers: int) -> dict[str, torch.Tensor]:
    """Weights and moments by name."""
    shapes = {"embed_tokens": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, rows, columns in (
            ("q", HIDDEN, HIDDEN), ("k", KEY_VALUE, HIDDEN), ("v", KEY_VALUE, HIDDEN), ("o", HIDDEN, HIDDEN),
            ("gate", INTERMEDIATE, HIDDEN), ("up", INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE),
        ):  # fmt: skip
            shapes[f"layers.{layer}.{name}"] = (rows, columns)
    return {
        f"{name}/{part}": torch.randn(shape)
        for name, shape in shapes.items()
        for part in ("weight", "exp_avg", "exp_avg_sq")
    }


def plain(folder: Path, write: Callable[[Path], None]) -> None:
    """A save as in other trainers, which survives a power cut afterwards."""
    new, old = folder / "new", folder / "old"
    new.mkdir(parents=True)
    write(new)
    for path in (*new.iterdir(), new):
        flush(path)
    shutil.rmtree(old, ignore_errors=True)
    new.rename(old)
    flush(folder)


@dataclass(frozen=True)
class Took:
    """Seconds of a piece of work, and CPU seconds of all threads."""

    wall: float
    cpu: float


def measured(work: Callable[[], Any]) -> Took:
    """Wait until the disk is idle."""
    os.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def compared(root: Path, write: Callable[[Path], None], rounds: int) -> dict[str, Any]:
    """Plain and verified saves in turns, the first of each thrown away; medians, the best, and the ratio of pairs."""
    checkpoints, pairs = Checkpoints(root / "verified", KEY, last=1), []
    for step in range(rounds + 1):
        before = measured(partial(plain, root / "plain", write))
        after = measured(partial(checkpoints.save, step, write, {"step": step}))
        print(f"  plain {before.wall:.2f} s, verified {after.wall:.2f} s", flush=True)
        pairs.append((before, after))
    folder = root / "verified" / f"step-{rounds:08d}"
    sizes = {path: path.stat().st_size for path in folder.iterdir()}
    alone = measured(lambda: dict(sealed.hashes(sizes)))
    shutil.rmtree(root)
    figures: dict[str, Any] = {
        "ratio": statistics.median(after.wall / before.wall for before, after in pairs[1:]),
        "sha256_alone": asdict(alone),
    }
    for name, took in zip(("plain", "verified"), zip(*pairs[1:], strict=True), strict=True):
        figures[name] = {
            "median": statistics.median(each.wall for each in took),
            "best": min(each.wall for each in took),
            "cpu": statistics.median(each.cpu for each in took),
            "all": [each.wall for each in took],
        }
    return figures


def main() -> int:
    """Measure, print, and compare with the goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="pairs of saves for each writer (default: 5)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a try (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    tensors = state(options.layers)
    size = sum(tensor.nbytes for tensor in tensors.values())
    writers: dict[str, Callable[[Path], None]] = {
        "safetensors": lambda folder: save_file(tensors, folder / "state.safetensors"),
        "torch.save": lambda folder: torch.save(tensors, folder / "state.pt"),
    }
    print(f"{size / 1e9:.2f} GB, {options.rounds} rounds, {len(os.sched_getaffinity(0))} cores", flush=True)
    figures: dict[str, Any] = {"bytes": size}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for name, write in writers.items():
            figures[name] = compared(Path(place, name), write, options.rounds)
            for way in ("plain", "verified"):
                one = figures[name][way]
                print(
                    f"{name}, {way}: {one['median']:.2f} s, best {one['best']:.2f} s, CPU {one['cpu']:.2f} s"
                )
            best = figures[name]["verified"]["best"] / figures[name]["plain"]["best"]
            print(
                f"{name}: ratio {figures[name]['ratio']:.2f} (median of pairs; goal {GOAL}), of the best {best:.2f}; "
                f"sha256 alone {figures[name]['sha256_alone']['wall']:.2f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(figures[name]["ratio"] > GOAL for name in writers))


if __name__ == "__main__":
    sys.exit(main())
