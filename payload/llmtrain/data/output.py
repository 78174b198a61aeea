"""The data set: rows and what belongs to them, put in place so that there is always a whole one."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from llmcore.files import flush, write_aside
from llmtrain.data.pack import LINEAGE
from llmtrain.data.report_page import page
from llmtrain.data.rows import SOURCES, tokenizer_digest, write_index
from llmtrain.data.settings import Settings
from llmtrain.data.tokenization import COUNTED
from llmtrain.data.work_directory import Found, write_json
from llmtrain.exits import Refusal

REJECTS = "rejects.jsonl"


def publish(
    settings: Settings, made: dict[str, Found], packed: Found, learned_from: set[str]
) -> dict[str, Any]:
    """Put the data set into `output`, its index last; the report. Raises Refusal where no row is left.

    `learned_from` are the input files by their sha256, so that the gate knows a held-out set that is one of them.
    """
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    drops = gather_rejects(output / REJECTS, made)
    report = report_of(made, packed, settings.pack.seq_len, drops)
    write_json(output / "report.json", report)
    write_aside(output / "report.html", page(output.name, report))
    shards = []
    for number, (directory, result) in enumerate((path, result) for path, result in packed if result["rows"]):
        # The name has the content's hash: a run never changes a file that the index of the last one names.
        stem = f"{number:05d}-{result['sha256'][:8]}"
        rows, lineage = f"rows-{stem}.safetensors", f"documents-{stem}.jsonl.gz"
        place(directory / result["file"], output / rows)
        place(directory / LINEAGE, output / lineage)
        shards.append(
            {"file": rows, "rows": result["rows"], "sha256": result["sha256"], "documents": lineage}
        )
    if not shards:
        raise Refusal(
            f"no document is left for {output}: {dict(drops.most_common(3))} dropped; see {output / REJECTS}"
        )
    write_aside(output / SOURCES, "".join(f"{digest}\n" for digest in sorted(learned_from)))
    totals = {name: report["rows"][name] for name in ("documents", "tokens", "learned", "padding", "split")}
    write_index(output, settings.pack.seq_len, tokenizer_digest(settings.tokenizer), shards, **totals)
    flush(output)
    named = {name for shard in shards for name in (shard["file"], shard["documents"])}
    for old in [*output.glob("rows-*.safetensors"), *output.glob("documents-*.jsonl.gz")]:
        if old.name not in named:
            old.unlink()
    return report


def place(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk is another."""
    if target.exists() and target.samefile(source):
        return
    aside = target.with_name(target.name + ".partial")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
        flush(aside)
    aside.replace(target)


def gather_rejects(path: Path, made: dict[str, Found]) -> Counter[str]:
    """One file of all that was dropped, in the order of steps and shards; how many by rule."""
    drops: Counter[str] = Counter()
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        for found in made.values():
            for directory, _ in found:
                for rejects in sorted(directory.glob("*-?????.jsonl")):
                    with rejects.open("rb") as lines:
                        for line in lines:
                            file.write(line)
                            drops[json.loads(line)["rule"]] += 1
    flush(aside)
    aside.replace(path)
    return drops


def report_of(made: dict[str, Found], packed: Found, seq_len: int, drops: Counter[str]) -> dict[str, Any]:
    """What a data team asks: how much went in and out, of what kind, and what was dropped for which reason."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    for _, result in made["tokenize"]:
        for name, count in counts.items():
            count.update(result["counts"][name])
    totals = {
        name: sum(result[name] for _, result in packed)
        for name in ("rows", "documents", "tokens", "learned", "padding", "split")
    }
    places = totals["rows"] * seq_len
    steps = [
        {
            "step": step,
            "documents": sum(r["count"] for _, r in found),
            "bytes": sum(r["size"] for _, r in found),
        }
        for step, found in made.items()
        if all("size" in result for _, result in found)
    ]
    return {
        "steps": steps,
        "dropped": dict(sorted(drops.items())),
        "rows": {**totals, "seq_len": seq_len, "padding_share": round(totals["padding"] / max(places, 1), 6)},
        **{name: dict(sorted(count.items())) for name, count in counts.items()},
    }
