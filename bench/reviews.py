#!/usr/bin/python3.13
"""Measures the cost of opening the experts' queue and of counting an experiment's ratings: CPU time to read a journal.

The journal is generated: exchanges of 6 kB, half of them rated, one in twenty badly, each assigned to an arm. Needs nothing but
`make env`. Exit code 0.
"""

import argparse
import subprocess
import tempfile

from stand import PYTHON, ROOT

CODE = """
import json, sys, time
from pathlib import Path
from llmserve.feedback import outcomes, reviews

folder, exchanges, hours = Path(sys.argv[1]), int(sys.argv[2]), 50
for hour in range(hours):
    lines = {"answered": [], "rated": [], "assigned": []}
    for number in range(exchanges // hours):
        head = {"@timestamp": "2026-11-27T08:00:00.000+00:00", "transaction.id": f"{hour * exchanges + number:016x}",
                "user.id": "ada", "organization.id": "research"}
        lines["answered"].append(head | {"llmkeep.feedback.prompt": "word " * 1200, "llmkeep.feedback.answer": "no"})
        arm = {"name": "e", "arm": "control", "percent": 5, "unit": f"{number % 500:032x}"}
        lines["assigned"].append(head | {"llmkeep.experiment." + name: value for name, value in arm.items()})
        if number % 2:
            lines["rated"].append(head | {"llmkeep.feedback.thumb": "down" if number % 20 == 1 else "up"})
    for kind, records in lines.items():
        text = "".join(json.dumps(record, separators=(",", ":")) + "\\n" for record in records)
        (folder / f"{kind}-202611{1 + hour // 24:02d}T{hour % 24:02d}.jsonl").write_text(text)
    del lines
size = {kind: sum(path.stat().st_size for path in folder.glob(kind + "-*")) / 1e6 for kind in ("answered", "rated", "assigned")}
print(", ".join(f"{kind} {each:.0f} MB" for kind, each in size.items()))
shown = reviews.queue(folder, ["research"], 20)[0][-1].transaction
looks = {
    "the queue": lambda: reviews.queue(folder, ["research"], 20),
    "an answer": lambda: reviews.item(folder, ["research"], shown),
    "an experiment": lambda: sum(1 for _ in outcomes.outcomes(folder, "e", outcomes.METRICS)),
}
for name, look in looks.items():
    best = []
    for _ in range(3):
        begun = time.process_time()
        look()
        best.append(time.process_time() - begun)
    print(f"{name}: {min(best):.2f} s of CPU")
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--exchanges", type=int, default=150_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [PYTHON, "-c", CODE, folder, str(given.exchanges)]
        subprocess.run(command, cwd=ROOT / "payload", check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
