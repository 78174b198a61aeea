"""Stands in for wipefs and blkid."""

import subprocess


class Probes:
    """What wipefs and blkid say: (exit code, output, error output) of each."""

    def __init__(
        self, wipefs: tuple[int, str, str] = (0, "", ""), blkid: tuple[int, str, str] = (2, "", "")
    ) -> None:
        self.said, self.asked = {"wipefs": wipefs, "blkid": blkid}, list[list[str]]()

    def __call__(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        self.asked.append(argv)
        return subprocess.CompletedProcess(argv, *self.said[argv[0]])
