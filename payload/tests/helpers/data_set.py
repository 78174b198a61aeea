"""A small but realistic data set for the tests of `llm-train data`."""

import json
from pathlib import Path
from typing import Any

from tiny import make_tokenizer

from llmtrain.data.pipeline import run
from llmtrain.data.settings import Settings

WORDS = "river stone bridge winter market garden letter engine window harvest silver copper valley"


def sentence(seed: int, words: int = 30) -> str:
    """Text that shares little with that of any other seed."""
    words_there = WORDS.split()
    spoken, state = [], seed * 2654435761 % 2**32 + 1
    for _ in range(words):
        state = state * 1103515245 % 2**31 + 12345
        spoken.append(f"{words_there[state // 65536 % len(words_there)]}{state // 1024 % 97}")
    return " ".join(spoken)


def write_lines(path: Path, records: list[Any]) -> Path:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def settings_of(root: Path, **changed: Any) -> Settings:
    """Settings for `root/raw`, with a byte tokenizer and short rows."""
    if not (root / "tokenizer").exists():
        make_tokenizer(root / "tokenizer")
    described: dict[str, Any] = {
        "inputs": [{"path": str(root / "raw")}],
        "output": str(root / "out"),
        "work": str(root / "work"),
        "tokenizer": str(root / "tokenizer"),
        "pack": {"seq_len": 512, "shard_tokens": 4096},
    }
    return Settings.model_validate({**described, **changed})


def made(root: Path, **changed: Any) -> dict[str, Any]:
    """Run the pipeline in this process; returns its report."""
    return run(settings_of(root, **changed), workers=1, prune=False)


def rejects_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "out/rejects.jsonl").read_text().splitlines()]


def rules_of(root: Path) -> list[str]:
    """The rules by which documents were dropped."""
    return [line["rule"] for line in rejects_of(root)]


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Content of each file by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def done_in(work: Path) -> dict[str, int]:
    """Each finished result with its inode, which reveals whether it was computed again; partial results are left out."""
    done = [path for path in work.glob("*/*/done.json") if not path.parent.name.endswith(".partial")]
    return {str(path.relative_to(work)): path.stat().st_ino for path in done}
