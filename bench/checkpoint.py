"""What a verified checkpoint costs beside a plain save of the same state to the same disk, in turns.

The state is as big as that of SmolLM2-135M in full fine-tuning: float32 weights and AdamW's two moments (1.6 GB), random.
A plain save is `safetensors` or `torch.save`, an fsync of file and folder, and taking the save before away. A verified
one is `Checkpoints.save` with the same writer: it hashes, authenticates and names, too.
Before each the disk is idle (`sync`, not counted). `alone` is what sha256 would take by itself.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llmtrain import sealed
from llmtrain.checkpoint import Checkpoints
from safetensors.torch import save_file

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
    """A save as trainers do it, that a power cut after it does not undo."""
    new, old = folder / "new", folder / "old"
    new.mkdir(parents=True)
    write(new)
    for path in (*new.iterdir(), new):
        sealed.flush(path)
    shutil.rmtree(old, ignore_errors=True)
    new.rename(old)
    sealed.flush(folder)


def seconds(work: Callable[[], Any]) -> float:
    """After the disk has become idle."""
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compared(root: Path, write: Callable[[Path], None], rounds: int) -> dict[str, Any]:
    """Pairs of seconds, the first thrown away, and the median of their ratios."""
    checkpoints, pairs = Checkpoints(root / "verified", KEY, last=1), []
    for step in range(rounds + 1):
        before = seconds(partial(plain, root / "plain", write))
        after = seconds(partial(checkpoints.save, step, write, {"step": step}))
        print(f"  plain {before:.2f} s, verified {after:.2f} s", flush=True)
        pairs.append((before, after))
    folder = root / "verified" / f"step-{rounds:08d}"
    sizes = {path: path.stat().st_size for path in folder.iterdir()}
    alone = seconds(lambda: dict(sealed.hashes(sizes)))
    shutil.rmtree(root)
    ratio = statistics.median(after / before for before, after in pairs[1:])
    return {"pairs": pairs[1:], "ratio": ratio, "sha256_alone": alone}


def main() -> int:
    """Measure, print, judge."""
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
    print(f"{size / 1e9:.2f} GB, {options.rounds} rounds, {os.process_cpu_count()} cores", flush=True)
    figures: dict[str, Any] = {"bytes": size}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for name, write in writers.items():
            figures[name] = compared(Path(place, name), write, options.rounds)
            plain_s, verified_s = (
                statistics.median(pair) for pair in zip(*figures[name]["pairs"], strict=True)
            )
            print(
                f"{name}: plain {plain_s:.2f} s, verified {verified_s:.2f} s, ratio {figures[name]['ratio']:.2f} "
                f"(goal {GOAL}); sha256 alone {figures[name]['sha256_alone']:.2f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(figures[name]["ratio"] > GOAL for name in writers))


if __name__ == "__main__":
    sys.exit(main())
