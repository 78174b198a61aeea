"""Writes the data set to its output directory, so that the index always describes a complete one."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from llmcore.files import replacing, write_aside
from llmtrain.data.pack import LINEAGE
from llmtrain.data.report_page import page
from llmtrain.data.rows import SOURCES, tokenizer_digest, write_index
from llmtrain.data.settings import Settings
from llmtrain.data.tokenization import COUNTED
from llmtrain.data.work_directory import Found, write_json
from llmtrain.exits import Refusal

REJECTS = "rejects.jsonl"


def publish(
    settings: Settings, results: dict[str, Found], packed: Found, learned_from: set[str]
) -> dict[str, Any]:
    """Write the data set to `output`, its index last, and return the report. Raises Refusal if no row is left.

    `learned_from` has the sha256 of the input files, with which the gate recognizes a held-out set among them.
    """
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    drops = gather_rejects(output / REJECTS, results)
    report = report_of(results, packed, settings.pack.seq_len, drops)
    write_json(output / "report.json", report)
    write_aside(output / "report.html", page(output.name, report))
    shards = []
    for number, (directory, result) in enumerate((path, result) for path, result in packed if result["rows"]):
        # Names contain the hash of the content: a run never changes a file that the previous index names.
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
    names = {name for shard in shards for name in (shard["file"], shard["documents"])}
    for old in [*output.glob("rows-*.safetensors"), *output.glob("documents-*.jsonl.gz")]:
        if old.name not in names:
            old.unlink()
    return report


def place(source: Path, target: Path) -> None:
    """Link `source` to `target`, or copy it if they are on different disks."""
    if target.exists() and target.samefile(source):
        return
    with replacing(target) as aside:
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:
            shutil.copyfile(source, aside)


def gather_rejects(path: Path, results: dict[str, Found]) -> Counter[str]:
    """Collect the rejected documents in one file, in the order of steps and shards; return their number by rule."""
    drops: Counter[str] = Counter()
    with replacing(path) as aside, aside.open("wb") as file:
        for pairs in results.values():
            for directory, _ in pairs:
                for rejects in sorted(directory.glob("*-?????.jsonl")):
                    with rejects.open("rb") as lines:
                        for line in lines:
                            file.write(line)
                            drops[json.loads(line)["rule"]] += 1
    return drops


def report_of(results: dict[str, Found], packed: Found, seq_len: int, drops: Counter[str]) -> dict[str, Any]:
    """The report: documents and bytes per step, rows and tokens, their kinds, and the rejected documents by rule."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    for _, result in results["tokenize"]:
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
            "documents": sum(r["count"] for _, r in pairs),
            "bytes": sum(r["size"] for _, r in pairs),
        }
        for step, pairs in results.items()
        if all("size" in result for _, result in pairs)
    ]
    return {
        "steps": steps,
        "dropped": dict(sorted(drops.items())),
        "rows": {**totals, "seq_len": seq_len, "padding_share": round(totals["padding"] / max(places, 1), 6)},
        **{name: dict(sorted(count.items())) for name, count in counts.items()},
    }
