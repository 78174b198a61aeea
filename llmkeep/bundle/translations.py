"""Chinese pages of the documentation: their originals, and pages whose originals have newer commits."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llmkeep.errors import LlmkeepError

ENDING = ".zh-CN.md"
HEADER = re.compile(r"译自 \[\S+\]\((\S+)\).*，原文提交：`([0-9a-f]{12,40})`。")
OUTDATED = "**英文页较新。**"


@dataclass(frozen=True)
class Translation:
    """A Chinese page and its original, by paths in the tree; the commit of the original that it translates."""

    page: str
    original: str
    commit: str
    header: str


def translation(tree: Path, page: str) -> Translation:
    """The translation that a Chinese page states on its third line, below the title.

    Raises LlmkeepError unless that line names the English page beside it, and a commit by 12 hex digits or more.
    """
    name = PurePosixPath(page.removesuffix(ENDING) + ".md")
    line = "".join((tree / page).read_text().splitlines()[2:3])
    header = HEADER.fullmatch(line)
    if not header or header[1] != name.name:
        raise LlmkeepError(
            f"{page}: its third line is {line!r}; write `译自 [{name.name}]({name.name})，原文提交：`COMMIT`。`, "
            f"where COMMIT is the last one of {name}: git log -1 --format=%H -- {name}"
        )
    return Translation(page, str(name), header[2], line)


def outdated(tree: Path, names: list[str]) -> dict[Translation, list[str]]:
    """Translations in a tree whose originals have changed since, with the newer commits, newest first.

    Empty for a checkout without git's history or without the original commit.
    """
    commits = {}
    for page in sorted(name for name in names if name.endswith(ENDING)):
        stated = translation(tree, page)
        log = subprocess.run(
            ["git", "-C", tree, "log", "--format=%h", f"{stated.commit}..", "--", stated.original],
            capture_output=True,
            text=True,
            check=False,
        )
        if log.returncode == 0 and log.stdout:
            commits[stated] = log.stdout.split()
    return commits
