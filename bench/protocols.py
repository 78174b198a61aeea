#!/usr/bin/env python3
"""Runs ssh-audit on the sshd of each lab host, and testssl.sh on the edge's TLS.

    make peers PEER=protocols
    bench/protocols.py --instance lab

They connect from the lab's client network. The output has ssh-audit's findings other than `good` or `info`, testssl.sh's findings
of severity LOW and above, its grade, and the tests that testssl.sh could not run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"OK", "INFO"}


def ssh_findings(report: dict[str, Any]) -> list[str]:
    """Algorithms with a note of `fail` or `warn`, and weaknesses that ssh-audit names by themselves."""
    found = [f"CVE {each}" for each in report.get("cves", [])]
    for kind in ("kex", "key", "enc", "mac"):
        for algorithm in report[kind]:
            notes = algorithm["notes"]
            found += [
                f"{kind} {algorithm['algorithm']}: {level}: {note}"
                for level in ("fail", "warn")
                for note in notes.get(level, [])
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instance", default="lab", help="of the lab, which runs (default: lab)")
    parser.add_argument("--edge", default="llm1", help="the host of the edge (default: llm1)")
    words = parser.parse_args()
    lab = [str(ROOT / ".venv/bin/lab"), "--instance", words.instance]

    def connected(*command: str) -> str:
        done = subprocess.run(
            [*lab, "netns", "--", *command],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if not done.stdout:
            sys.exit(f"{command[0]} printed nothing and ended with {done.returncode}: {done.stderr[-800:]}")
        return done.stdout

    authority = ROOT / ".lab/instances" / words.instance / "ca.pem"
    status = subprocess.run([*lab, "status", "--json"], capture_output=True, text=True, check=True).stdout
    addresses = {name: host["address"] for name, host in json.loads(status)["hosts"].items()}
    for name, address in addresses.items():
        findings = ssh_findings(json.loads(connected("ssh-audit", "--json", address)))
        print(f"{name}: ssh-audit: {len(findings)} findings", *findings, sep="\n  ")
    with tempfile.TemporaryDirectory(prefix="llmkeep-bench-") as folder:
        file = Path(folder) / "testssl.json"
        options = ["--quiet", "--color=0", f"--add-ca={authority}", f"--jsonfile={file}"]
        connected("testssl", *options, f"{addresses[words.edge]}:443")
        results = json.loads(file.read_text())
    loud = [each for each in results if each["severity"] not in QUIET]
    grade = next((each["finding"] for each in results if each["id"] == "overall_grade"), "none")
    print(f"{words.edge}: testssl.sh: {len(results)} results, grade {grade}")
    for each in loud:
        print(f"  {each['severity']} {each['id']}: {each['finding']}")


if __name__ == "__main__":
    main()
