"""fuzz_campaign.py FOLDER [NAME...]: fuzz the targets of FOLDER/targets.py by coverage, FUZZ_SECONDS each, with atheris.

An input that fails is written to .lab/fuzz/NAME; exit code 1 then. New inputs that reach more code are in .lab/fuzz/NAME/reached.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import atheris  # type: ignore[import-untyped,unused-ignore]  # `make peers PEER=atheris` installs it
from fuzzing import MEMORY_BYTES, MOST_BYTES, Target, mutant

ROOT = Path(__file__).resolve().parents[2]
INSTRUMENTED = [
    "llmkeep",
    "llmproof",
    "llmcore",
    "llmserve",
    "llmtrain",
    "ansible_collections",
    "gguf",
    "yaml",
    "tarfile",
]
CPU_SECONDS = 10.0  # for one input of instrumented code
HANG_SECONDS = 60


def targets(folder: str) -> dict[str, Target]:
    """By name."""
    sys.path.insert(0, folder)
    with atheris.instrument_imports(include=INSTRUMENTED):
        return {each.name: each for each in importlib.import_module("targets").TARGETS}


def fuzz(target: Target, seconds: int) -> None:
    """Ends the process: with 0 after so many seconds, with another code where an input fails."""
    out = ROOT / ".lab/fuzz" / target.name
    (out / "reached").mkdir(parents=True, exist_ok=True)
    entries = list(target.entries.values())

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = Random(seed)  # noqa: S311 -- a test's inputs
        changed = mutant(data, entries, chance) if chance.random() < 0.5 else atheris.Mutate(data, most)
        return bytes(changed[:most])

    options = {
        "max_total_time": seconds,
        "max_len": MOST_BYTES,
        "timeout": HANG_SECONDS,
        "rss_limit_mb": 2 * MEMORY_BYTES >> 20,
        "artifact_prefix": f"{out}/",
        "print_final_stats": 1,
        "verbosity": 0,
    }
    argv = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items())]
    atheris.Setup(
        [*argv, str(out / "reached"), str(target.corpus)],
        lambda data: target.run(data, CPU_SECONDS),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def main(folder: str, *names: str) -> int:
    """Each target in a process of its own; all run to their end."""
    chosen = targets(folder)
    if len(names) == 1:
        fuzz(chosen[names[0]], int(os.environ.get("FUZZ_SECONDS") or 600))
    failed = [
        each
        for each in names or chosen
        if subprocess.run([sys.executable, __file__, folder, each], check=False).returncode
    ]
    print(f"fuzz: {len(names or chosen) - len(failed)} passed; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
