#!/usr/bin/python3.13
"""Measures the cost of `llmkeep model add`: throughput compared with `cp` and `sync` of the same files in the same run, and peak
memory.

A random model of float32 shards is written below FOLDER, and copied in turns by `cp` (then synced) and by the command, which
syncs its files too. `--hub` fetches it from the stand-in of a hub on loopback instead of a directory. `--kills N` interrupts
one more intake by kill -9 at N points, splits the candidate over two media, joins them with N kills, and compares both results.
It takes three times the model's space. Exit code 0, or 1 if a command failed or a result differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/helpers"))

from hub_standin import HubStandIn, serving  # noqa: E402
from sharded_deepseek import CARD, CONFIG, LICENCE  # noqa: E402

SHARD = 1 << 30  # bytes of a shard's only tensor
BLOCK = 64 << 20
KIB = 1024  # of ru_maxrss
INCOMPLETE = 7  # exit code of `bundle join` while media are missing
WORDS = {True: "the same", False: "NOT THE SAME"}


def write_model(folder: Path, shards: int) -> None:
    """Shards of random bytes with an index, as a DeepSeek repository has them."""
    folder.mkdir()
    index = {}
    for number in range(1, shards + 1):
        name, tensor = f"model-{number:05}-of-{shards:05}.safetensors", f"model.layers.{number}.weight"
        index[tensor] = name
        header = json.dumps(
            {tensor: {"dtype": "F32", "shape": [SHARD // 4], "data_offsets": [0, SHARD]}}
        ).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for _ in range(SHARD // BLOCK):
                stream.write(os.urandom(BLOCK))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text(LICENCE)


def llmkeep(*words: object) -> list[str]:
    return [sys.executable, "-m", "llmkeep", *map(str, words)]


def add(source: str, into: Path) -> list[str]:
    return llmkeep("model", "add", source, "--into", into, "--name", "bench", "--accept-licence", "deepseek")


def launched(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)


def timed(start: float, size: int) -> float:
    """MB/s since `start`, with everything on disk."""
    os.sync()
    return size / (time.monotonic() - start) / 1e6


def measured(
    source: str, model: Path, into: Path, environment: dict[str, str]
) -> tuple[float, float, float, float]:
    """MB/s of `cp` and of the command; the latter's peak memory in MB, and its CPU seconds per GB."""
    size = sum(path.stat().st_size for path in model.iterdir())
    os.sync()
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(model), str(into)], check=True)
    by_cp = timed(start, size)
    shutil.rmtree(into)
    os.sync()
    start = time.monotonic()
    process = launched(add(source, into), environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"llmkeep model add ended with {status}")
    rate = timed(start, size)
    return by_cp, rate, usage.ru_maxrss * KIB / 1e6, (usage.ru_utime + usage.ru_stime) / size * 1e9


def written(place: Path) -> int:
    """Bytes of the files in the hidden folders of PLACE, where unfinished work lies."""
    found = 0
    for path in place.glob(".*/**/*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            found += path.stat().st_size if path.is_file() else 0
    return found


def killed(commands: list[list[str]], environment: dict[str, str], place: Path, kills: int, size: int) -> int:
    """Run each command until it ends by itself, with `kills` kill -9 at even distances of what they write; the kills done."""
    done = 0
    for command in commands:
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            process = launched(command, environment)
            while process.poll() is None:
                if done < kills and written(place) >= size * (done + 1) // (kills + 1):
                    process.send_signal(signal.SIGKILL)
                    done += 1
                    break
                time.sleep(0.002)
            code = process.wait()
        if code not in (0, INCOMPLETE):
            sys.exit(f"{' '.join(command)} ended with {code}")
    return done


def same(model: Path, candidate: Path) -> bool:
    return all(
        digest(path) == digest(candidate / "models/bench" / path.name) for path in model.glob("*.safetensors")
    )


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to measure")  # noqa: S108
    parser.add_argument("--gigabytes", type=int, default=10, help="GiB of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many (default: %(default)s)")
    parser.add_argument("--hub", action="store_true", help="from the stand-in of a hub, on loopback")
    parser.add_argument("--kills", type=int, default=0, help="interrupt one more intake so often")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, ExitStack() as stack:
        model, into = Path(folder, "model"), Path(folder, "candidate")
        write_model(model, given.gigabytes)
        source, environment = str(model), dict(os.environ)
        if given.hub:
            hub = stack.enter_context(serving(HubStandIn("bench/model", model)))
            source = hub.source
            environment |= {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"}
            hub.listing()  # hashes the files once
        rounds = []
        for _ in range(given.rounds):
            rounds.append(measured(source, model, into, environment))
            shutil.rmtree(into)
        by_cp, by_add, memory, seconds = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(
            f"{given.gigabytes} GiB, median of {given.rounds}: cp {by_cp:.0f} MB/s, model add {by_add:.0f} MB/s "
            f"({by_add / by_cp:.2f} of it), peak memory {memory:.0f} MB, {seconds:.1f} s of CPU per GB; "
            f"load {os.getloadavg()[0]:.1f}"
        )
        if given.kills:
            size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
            media, joined = Path(folder, "media"), Path(folder, "joined")
            kills = killed([add(source, into)], environment, into.parent, given.kills, size)
            as_before = [same(model, into)]
            print(f"model add: killed {kills} times, then done; every shard is {WORDS[as_before[0]]}")
            split = llmkeep("bundle", "split", into, "--size", f"{size * 6 // 10}", "--out", media)
            subprocess.run(split, check=True, cwd=ROOT)
            begun = time.monotonic()
            joins = [llmkeep("bundle", "join", media / number, "--into", joined) for number in ("2", "1")]
            kills = killed(joins, environment, joined.parent, given.kills, size)
            seconds = time.monotonic() - begun
            as_before.append(same(model, joined))
            print(
                f"bundle join: killed {kills} times, done after {seconds:.0f} s; every shard is {WORDS[as_before[1]]}"
            )
            return 0 if as_before == [True, True] else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
