#!/usr/bin/python3.13
"""Which checks of roles, mutations of scenarios and tests a revision had that this tree has no longer.

usage: tests/lost.py REVISION

A test is known by the name of its function, so that one which moved is not lost; a mutation by what it does and which checks
have to fail. The exit status is 1 if anything was lost.
"""

import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from roledoc import checks_of

FOLDERS = ("roles", "molecule", "tests", "payload/tests")


def files_of(revision: str) -> Iterator[tuple[str, str]]:
    archive = subprocess.run(["git", "archive", revision, *FOLDERS], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if wanted(member.name) and (content := tar.extractfile(member)):
                yield member.name, content.read().decode()


def files_here() -> Iterator[tuple[str, str]]:
    names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *FOLDERS]
    for name in subprocess.run(names, check=True, capture_output=True, text=True).stdout.splitlines():
        if wanted(name) and Path(name).is_file():
            yield name, Path(name).read_text(encoding="utf-8")


def wanted(name: str) -> bool:
    return name.endswith((".yml", ".py"))


def proofs(files: Iterator[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Checks, mutations and tests, and how often there is each."""
    found: dict[str, Counter[str]] = {"checks": Counter(), "mutations": Counter(), "tests": Counter()}
    for name, text in files:
        if name.startswith("roles/"):
            if name.endswith("/tasks/verify.yml"):
                found["checks"].update(check["id"] for check in checks_of(text))
        elif name.endswith("/scenario.yml"):
            role = name.split("/")[1]
            for mutation in yaml.safe_load(text)["mutations"]:
                done = {key: value for key, value in mutation.items() if key in ("break", "then", "file")}
                found["mutations"][f"{role}: {sorted(mutation['fails'])} by {json.dumps(done)}"] += 1
        elif name.endswith(".py"):
            found["tests"].update(re.findall(r"^ *(?:async )?def (test_\w+)\(", text, re.MULTILINE))
    return found


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    before, after = proofs(files_of(sys.argv[1])), proofs(files_here())
    for kind, had in before.items():
        lost = had - after[kind]
        print(f"{kind}: {had.total()} then, {after[kind].total()} here, {lost.total()} lost")
        print(*(f"  {each}" for each in sorted(lost)), sep="\n", end="\n" if lost else "")
    return int(any((had - after[kind]) for kind, had in before.items()))


if __name__ == "__main__":
    sys.exit(main())
