#!/usr/bin/python3.13
"""What encryption costs a volume: reading and writing through it, beside its disk as it is, on a running lab's llm1.

The raw disk is only read: the same bytes, past the page cache. Writing is shown through the volume alone, since the
raw disk has nothing to write to. `cryptsetup benchmark` says what the cipher alone does on this processor.
Needs `lab up` and the role luks. Exit code 0, or 1 if a command failed.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def on(host: str, command: str) -> str:
    """What a shell command prints on a host of the lab, both outputs together."""
    argv = [str(ROOT / ".venv/bin/lab"), "exec", host, "--", "sh", "-c", f"{{ {command}; }} 2>&1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode} on {host}: {done.stdout}{done.stderr}")
    return done.stdout


def megabytes_a_second(said: str) -> float:
    """Of dd's last line: bytes and seconds, whatever unit it rounds to."""
    found = re.search(r"(\d+) bytes.*copied, ([\d.e+-]+) s", said)
    if not found:
        sys.exit(f"dd said {said!r}")
    return int(found[1]) / float(found[2]) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=256, help="per round (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="for a machine")
    given = parser.parse_args()
    volume = next(
        found
        for found in json.loads(on("llm1", "llmkeep-volumes status"))["volumes"]
        if found["volume"] == "data"
    )
    disk = on("llm1", f"readlink -f /dev/disk/by-uuid/{volume['uuid']}").strip()
    size = f"bs=1M count={given.megabytes}"
    file = f"{volume['mount']}/.bench"
    ways = {
        "read, raw disk": f"dd if={disk} of=/dev/null iflag=direct skip=16 {size}",
        "read, volume": f"dd if=/dev/mapper/llm_data of=/dev/null iflag=direct {size}",
        "write, volume": f"dd if=/dev/zero of={file} oflag=direct conv=fsync {size}; rm {file}",
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way, command in ways.items():
            rates[way].append(megabytes_a_second(on("llm1", command)))
    found = {way: round(statistics.median(seen)) for way, seen in rates.items()}
    cipher = on("llm1", "cryptsetup benchmark --cipher aes-xts --key-size 512 | tail -n 1").split()
    found["cipher alone, encrypting"], found["cipher alone, decrypting"] = (
        round(float(word) * 1.048576) for word in (cipher[2], cipher[4])
    )
    if given.json:
        print(json.dumps({"megabytes_a_second": found, "rounds": given.rounds}))
    else:
        print(f"| MB/s, median of {given.rounds} |  |\n|---|---|")
        print("\n".join(f"| {way} | {rate} |" for way, rate in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
