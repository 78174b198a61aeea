#!/usr/bin/python3.13
"""What encryption costs a volume: the same file on the volume and on the root disk, which lies in clear, on a running lab's llm1.

Both are ext4 on disks of one driver, written once before, and read and written past the host's page cache (O_DIRECT),
in turns. The lab's disks are files of this machine, in its page cache: so both are as fast as memory, and what is told
is what encryption costs at worst, not how fast a disk is. `cryptsetup benchmark` says what the cipher alone does.
Needs a lab with `site.yml` run. Exit code 0, or 1 if a command failed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLEAR, VOLUME = "/var/tmp/.bench", "/srv/llmkeep/.bench"  # noqa: S108 - on a host of the lab, by root
WAYS = {
    "read": "dd if={file} of=/dev/null iflag=direct bs=1M count={count}",
    "write": "dd if=/dev/zero of={file} oflag=direct conv=notrunc,fsync bs=1M count={count}",
}


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


def measured(rounds: int, megabytes: int) -> dict[str, dict[str, list[float]]]:
    """way → place → MB/s of each round; in every second round the other place comes first."""
    places = {"clear": CLEAR, "volume": VOLUME}
    rates: dict[str, dict[str, list[float]]] = {way: {place: [] for place in places} for way in WAYS}
    lies = on("llm1", f"findmnt -no TARGET --target {VOLUME.rsplit('/', 1)[0]}").strip()
    if lies != VOLUME.rsplit("/", 1)[0]:
        sys.exit(f"{VOLUME} would lie on {lies}: the volume is not mounted, run `site.yml`")
    try:
        for file in places.values():
            on("llm1", WAYS["write"].format(file=file, count=megabytes).replace("notrunc,", ""))
        for number in range(rounds):
            for way, command in WAYS.items():
                for place in list(places)[:: -1 if number % 2 else 1]:
                    said = on("llm1", command.format(file=places[place], count=megabytes))
                    rates[way][place].append(megabytes_a_second(said))
    finally:
        on("llm1", f"rm -f {CLEAR} {VOLUME}")
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="the median of so many (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=128, help="per round (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="for a machine")
    given = parser.parse_args()
    rates = measured(given.rounds, given.megabytes)
    said = on("llm1", "cryptsetup benchmark --cipher aes-xts --key-size 512 | tail -n 1").split()
    cipher = {"write": float(said[2]) * 1.048576, "read": float(said[4]) * 1.048576}
    load = os.getloadavg()[0]
    if given.json:
        print(json.dumps({"megabytes_a_second": rates, "cipher_alone": cipher, "load": load}))
        return 0
    print(f"MB/s, median of {given.rounds} rounds (least to most); load of this machine {load:.1f}\n")
    print("| | in clear | volume | volume / clear | cipher alone |\n|---|---|---|---|---|")
    for way, places in rates.items():
        middle = {place: statistics.median(seen) for place, seen in places.items()}
        cells = [
            f"{middle[place]:.0f} ({min(seen):.0f} to {max(seen):.0f})" for place, seen in places.items()
        ]
        ratio = middle["volume"] / middle["clear"]
        print(f"| {way} | {' | '.join(cells)} | {ratio:.2f} | {cipher[way]:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
