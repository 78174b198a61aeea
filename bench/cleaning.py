#!/usr/bin/env python3
"""Cleaning with near-duplicates: MB of text per second of CPU, compared with datatrove on the same text in the same run.

Text: Debian's documentation below /usr/share/doc, as JSONL. Both read it, apply their quality rules, replace personal data,
and drop near-duplicates by MinHash with the same 14 bands of 8 hashes over runs of 5 words; ours also cleans by its rules.
Quality is computed with thresholds that keep all of this text (Gopher's own drop 98 % of it, since it is technical), so that both
compare the same documents; the number that is left shows it. The turns alternate. The result is the CPU time of one process on
one core, without imports and without each side's first use of its tables and models. Ours writes compressed and synced output,
datatrove plain and unsynced output, which favours datatrove.

The second part measures only ours: peak memory while the text grows tenfold. The added text is new: each word gets a number.

Needs, in payload/.venv, what `make env` puts there, and for the comparison datatrove, spacy, orjson and xxhash by hand;
without them that half is omitted, and the output says so. Exit code 0, or 1 where a goal is missed.
"""

import argparse
import gzip
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(ROOT / "payload/.venv/bin/python")
GOAL = 2.0  # times datatrove's speed
GROWTH = 1.5  # how much more memory ten times the text may take
FILES = 4


def texts(limit: int) -> list[str]:
    """Debian's documentation, up to a number of bytes; documents have at most 6,000 letters, like most web pages."""
    found: list[str] = []
    size = 0
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if path.suffix not in (".gz", ".txt", ".md", ".html") and path.name != "copyright":
            continue
        if not path.is_file() or path.is_symlink():
            continue
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        for start in range(0, len(text), 6_000):
            found.append(text[start : start + 6_000])
            size += len(found[-1].encode())
        if size >= limit:
            break
    return found


def write(directory: Path, said: list[str], times: int) -> int:
    """As JSONL in a few files, `times` over with other words; the bytes of text."""
    directory.mkdir(parents=True)
    size = 0
    files = [(directory / f"{number:03d}.jsonl").open("w") for number in range(FILES * times)]
    for turn in range(times):
        for number, text in enumerate(said):
            words = re.sub(r"([A-Za-z]{3,})", rf"\g<1>{turn}", text) if turn else text
            size += len(words.encode())
            files[turn * FILES + number % FILES].write(
                json.dumps({"text": words, "id": f"{turn}-{number}"}) + "\n"
            )
    for file in files:
        file.close()
    return size


def ours(raw: Path, work: Path) -> int:
    """Run our steps in one process; returns the number of documents left."""
    from functools import partial

    from llmtrain.data import minhash, personal_data, quality
    from llmtrain.data.pipeline import Pipeline
    from llmtrain.data.settings import Settings
    from llmtrain.data.work_directory import working

    settings = Settings.model_validate(
        {
            "inputs": [{"path": str(raw)}],
            "output": str(work),
            "work": str(work / "work"),
            "tokenizer": str(work),
            "reading": {"shard_mb": 4},
            "quality": {"min_letters": 0, "max_symbols": 1, "max_repeated_lines": 1, "min_compressed": 0},
            "duplicates": {"memory_mb": 16},
        }
    )
    near = settings.duplicates.near
    assert near
    assert settings.quality
    assert settings.personal
    with working(settings.work, 1) as place:
        pipeline = Pipeline(settings, place)
        left = pipeline.read()
        left = pipeline.each("quality", quality.Quality, (quality,), left, settings.quality)
        step = personal_data.Personal
        left = pipeline.each("personal", step, (personal_data,), left, settings.personal, None)
        left = pipeline.duplicates("near", partial(minhash.near_keys, near), near.bands, [], left)
    return sum(shard.count for shard in left)


def theirs(raw: Path, work: Path) -> int:
    """Run datatrove's equivalent blocks in one process; returns the number of documents left."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherQualityFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    options = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    tasks = len(list(raw.glob("*.jsonl")))

    def run(name: str, pipeline: list[Any], count: int) -> None:
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=count, workers=1, logging_dir=str(work / "logs" / name)
        ).run()

    def path(name: str) -> str:
        return str(work / name)

    gopher = GopherQualityFilter(
        min_doc_words=0,
        max_doc_words=10**9,
        min_avg_word_length=0,
        max_avg_word_length=10**9,
        max_symbol_word_ratio=10**9,
        max_bullet_lines_ratio=1,
        max_ellipsis_lines_ratio=1,
        max_non_alpha_words_ratio=-1,
        min_stop_words=-1,
    )
    writer = JsonlWriter(path("filtered"), output_filename="${rank}.jsonl", compression=None)
    run("filter", [JsonlReader(str(raw)), gopher, PIIFormatter(), writer], tasks)
    run("sign", [JsonlReader(path("filtered")), MinhashDedupSignature(path("signs"), config=options)], tasks)
    run("buckets", [MinhashDedupBuckets(path("signs"), path("buckets"), config=options)], options.num_buckets)
    run("cluster", [MinhashDedupCluster(path("buckets"), path("remove"), config=options)], 1)
    last = JsonlWriter(path("left"), output_filename="${rank}.jsonl", compression=None)
    run("drop", [JsonlReader(path("filtered")), MinhashDedupFilter(path("remove")), last], tasks)
    return sum(sum(1 for _ in each.open()) for each in (work / "left").glob("*.jsonl"))


def cpu() -> float:
    """Seconds of this process and its children, all threads."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def child(side: str, raw: Path) -> None:
    """One side once, after a first use on a few documents; prints what it took."""
    run = ours if side == "ours" else theirs
    with tempfile.TemporaryDirectory(dir=raw.parent) as place:
        few = Path(place, "few")
        few.mkdir()
        with (raw / "000.jsonl").open() as file:
            (few / "000.jsonl").write_text("".join(line for line, _ in zip(file, range(5), strict=False)))
        Path(place, "first").mkdir()
        run(few, Path(place, "first"))
        Path(place, "work").mkdir()
        begun, wall = cpu(), time.monotonic()
        left = run(raw, Path(place, "work"))
        taken = {"cpu": cpu() - begun, "wall": time.monotonic() - wall, "left": left}
    # Not ru_maxrss: that begins with what the parent had when it started this process.
    [peak] = [
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    print("RESULT " + json.dumps({**taken, "peak_mb": peak}))


def measured(side: str, raw: Path) -> dict[str, float]:
    """One side in a process of its own."""
    words = [PYTHON, __file__, "--child", side, str(raw)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT}/payload",
    }
    answer = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{side} failed: {answer.stderr[-2000:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def can_compare() -> bool:
    """Whether datatrove and what it needs for English words are there."""
    words = [PYTHON, "-c", "import datatrove, spacy, orjson, xxhash"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def speed(place: Path, said: list[str], rounds: int) -> bool:
    """The first part; whether the goal is reached."""
    size = write(place / "raw", said, 1) / 1e6
    print(f"{size:.1f} MB of text, {len(said)} documents")
    sides = ["ours", "datatrove"] if can_compare() else ["ours"]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            one = measured(side, place / "raw")
            rates[side].append(size / one["cpu"])
            told = f"{one['left']:.0f} documents left, peak {one['peak_mb']:.0f} MB"
            print(f"{side:<10} {rates[side][-1]:6.2f} MB/s of CPU, {told}", flush=True)
    middle = statistics.median(rates["ours"])
    minutes = 100_000 / middle / 32 / 60
    print(f"100 GB on 32 cores at this rate: {minutes:.0f} min, where the disks keep up")
    if "datatrove" not in rates:
        print("datatrove, spacy, orjson or xxhash is not installed: no comparison")
        return True
    times = middle / statistics.median(rates["datatrove"])
    print(f"ours / datatrove: {times:.1f} times (goal {GOAL})")
    return times >= GOAL


def memory(place: Path, said: list[str]) -> bool:
    """The second part; whether the goal is reached."""
    peaks = []
    for times in (1, 10):
        raw = place / f"grown-{times}"
        size = write(raw, said[: len(said) // 4], times) / 1e6
        peaks.append(measured("ours", raw)["peak_mb"])
        print(f"ours on {size:6.1f} MB: peak {peaks[-1]:.0f} MB", flush=True)
    print(f"memory while text grows 10 times: {peaks[1] / peaks[0]:.2f} times (goal at most {GROWTH})")
    return peaks[1] <= GROWTH * peaks[0]


def main() -> int:
    """Both parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=float, default=12, help="of text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="0: memory alone (default: %(default)s)")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "RAW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return 0
    with tempfile.TemporaryDirectory() as place:
        said = texts(int(arguments.mb * 1e6))
        fast = not arguments.rounds or speed(Path(place), said, arguments.rounds)
        small = memory(Path(place), said)
    return 0 if fast and small else 1


if __name__ == "__main__":
    sys.exit(main())
