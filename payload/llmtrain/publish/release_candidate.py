"""Makes the release candidate: a model with its card and manifest."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from llmcore.manifest import write_manifest
from llmtrain.exits import NO_SPACE, Refusal
from llmtrain.publish.job_output import judged, read_job_output
from llmtrain.publish.merge import merge
from llmtrain.publish.model_card import LICENCE_FILES, card, licence_of

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")


def publish(
    output: Path, into: Path, name: str, verdict: Path, unproved: str | None, dtype: str, licence: str | None
) -> Path:
    """Make the release candidate and return its directory. Leaves nothing behind if it raises Refusal or ManifestError."""
    if not NAME.fullmatch(name):
        raise Refusal(
            f"the name is {name!r}: use lower-case letters, digits, dots and dashes, at most 63, with --name"
        )
    if into.exists():
        raise Refusal(f"{into} exists: specify a directory that does not exist")
    job_output = read_job_output(output)
    judgement = judged(verdict, job_output, unproved)
    licence_name = licence_of(job_output.base, licence)
    size = sum(
        path.stat().st_size
        for path in (job_output.base if job_output.is_adapter else job_output.learned).rglob("*")
        if path.is_file()
    )
    into.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(into.parent).free
    # 16-bit weights double in float32.
    if free < (space := size * (2 if dtype == "float32" else 1) + (64 << 20)):
        raise Refusal(
            f"{into.parent} has {free >> 20} MiB free, the model takes {space >> 20}: free disk space",
            NO_SPACE,
        )
    aside = into.with_name(f".{into.name}.partial")
    if aside.exists():
        shutil.rmtree(aside)
    model = aside / "models" / name
    try:
        model.parent.mkdir(parents=True)
        if job_output.is_adapter:
            near = merge(job_output, dtype, model)
        else:
            shutil.copytree(job_output.learned, model)
            near = {}
        for own in LICENCE_FILES:
            if (job_output.base / own).is_file():
                shutil.copyfile(job_output.base / own, model / own)
        record: dict[str, Any] = {
            "base": job_output.base_digest,
            "learned": job_output.learned_digest,
            "merged": near,
            "licence": licence_name,
        }
        record |= {"verdict": "promote"} if judgement else {"unproved": unproved}
        (model / "training.json").write_text(
            json.dumps({**job_output.training, "published": record}, indent=1) + "\n"
        )
        if judgement:
            (model / "verdict.json").write_text(json.dumps(judgement, indent=1) + "\n")
        (model / "README.md").write_text(card(name, job_output, licence_name, judgement, unproved, near))
        write_manifest(model, aside / "models" / f"{name}.sha256")
        for path in model.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        aside.rename(into)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return into
