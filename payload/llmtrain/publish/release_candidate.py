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
        raise Refusal(f"{into} exists: name a directory that does not")
    done = read_job_output(output)
    found = judged(verdict, done, unproved)
    known = licence_of(done.base, licence)
    size = sum(
        path.stat().st_size
        for path in (done.base if done.is_adapter else done.learned).rglob("*")
        if path.is_file()
    )
    into.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(into.parent).free
    # 16-bit weights double in float32.
    if free < (wanted := size * (2 if dtype == "float32" else 1) + (64 << 20)):
        raise Refusal(
            f"{into.parent} has {free >> 20} MiB free, the model takes {wanted >> 20}: free disk space",
            NO_SPACE,
        )
    aside = into.with_name(f".{into.name}.partial")
    if aside.exists():
        shutil.rmtree(aside)
    model = aside / "models" / name
    try:
        model.parent.mkdir(parents=True)
        if done.is_adapter:
            near = merge(done, dtype, model)
        else:
            shutil.copytree(done.learned, model)
            near = {}
        for own in LICENCE_FILES:
            if (done.base / own).is_file():
                shutil.copyfile(done.base / own, model / own)
        told: dict[str, Any] = {
            "base": done.base_digest,
            "learned": done.learned_digest,
            "merged": near,
            "licence": known,
        }
        told |= {"verdict": "promote"} if found else {"unproved": unproved}
        (model / "training.json").write_text(
            json.dumps({**done.training, "published": told}, indent=1) + "\n"
        )
        if found:
            (model / "verdict.json").write_text(json.dumps(found, indent=1) + "\n")
        (model / "README.md").write_text(card(name, done, known, found, unproved, near))
        write_manifest(model, aside / "models" / f"{name}.sha256")
        for path in model.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        aside.rename(into)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return into
