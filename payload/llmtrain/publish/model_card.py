"""The model card of a published model, and the licence it inherits."""

import json
import re
from pathlib import Path
from typing import Any

from yaml import YAMLError

from llmtrain.exits import Refusal
from llmtrain.publish.job_output import JobOutput

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def card(
    name: str,
    done: JobOutput,
    licence: str,
    found: dict[str, Any] | None,
    unproved: str | None,
    near: dict[str, Any],
) -> str:
    """The model card, README.md."""
    from huggingface_hub import ModelCardData

    job, losses = done.training["job"], losses_of(done.training)
    if found is None:
        gate = f"**Not proved better than its base.** Published all the same, because: {unproved}\n"
    else:
        rows = "\n".join(
            f"| {metric} | {each['old']:.4g} | {each['new']:.4g} | {each['gain']:+.4g} "
            f"({each['interval'][0]:+.4g} to {each['interval'][1]:+.4g}) | {each['finding']} |"
            for metric, each in found["metrics"].items()
        )
        gate = (
            f"{found['verdict']}: {found['reasons'][0]}. Held-out set: sha256 `{found['data']['sha256']}`; "
            f"rule: sha256 `{found['rule']['sha256']}`.\n\n"
            f"| metric | before | now | gain (interval) | finding |\n|---|---|---|---|---|\n{rows}\n"
        )
    merging = (
        f"\nMerged: the logits of {near['prompts']} prompts differ from those of base and adapter by {near['rounding']:.2%} of "
        f"what the adapter does ({near['dtype']}).\n"
        if near
        else ""
    )
    described = json.dumps(job, indent=1, sort_keys=True, default=str)
    spdx = re.fullmatch(r"[A-Za-z0-9.-]+", licence)
    facts = ModelCardData(
        license=licence.lower() if spdx else "other",
        license_name=None if spdx else licence,
        base_model=done.base.name,
        library_name="transformers",
    )
    return (
        f"---\n{facts.to_yaml()}\n---\n# {name}\n\n"
        f"Base: `{done.base.name}`, manifest sha256 `{done.base_digest}`.\n"
        f"Learned: {'LoRA adapter' if done.is_adapter else 'all weights'}, manifest sha256 `{done.learned_digest}`.\n"
        f"Licence: {licence}, which the base has.\n{merging}\n"
        f"## Verdict\n{gate}\n"
        f"## Data\n```json\n{json.dumps(done.training.get('data', []), indent=1, sort_keys=True)}\n```\n\n"
        f"## Losses\n```json\n{json.dumps(losses, indent=1, sort_keys=True)}\n```\n\n"
        f"## Job\n```json\n{described}\n```\n"
    )


def licence_of(base: Path, given: str | None) -> str:
    """The licence of the base: as given, by its card, or by the name of its LICENSE file; raises Refusal."""
    from huggingface_hub import ModelCard

    if given:
        return given
    if (path := base / "README.md").is_file():
        try:
            stated = ModelCard.load(path, ignore_metadata_errors=True).data
        except (ValueError, YAMLError) as error:
            raise Refusal(
                f"the head of {path} is no YAML ({error}): correct it, or give --licence"
            ) from error
        if found := stated.get("license_name") or stated.license:
            return str(found)
    if own := [name for name in LICENCE_FILES if (base / name).is_file()]:
        return f"that of the base, see {own[0]}"
    raise Refusal(
        f"{base} does not state its licence, which a derived model inherits: give it with --licence"
    )


def losses_of(training: dict[str, Any]) -> dict[str, Any]:
    """The first and the last logged loss of a job, by step, and the losses on its held-out rows."""
    logged = list((training.get("losses") or {}).items())
    found = {"first": dict(logged[:1]), "last": dict(logged[-1:])}
    return found | {name: training[name] for name in ("evaluations", "best") if training.get(name)}
