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
    job_output: JobOutput,
    licence: str,
    verdict: dict[str, Any] | None,
    unproved: str | None,
    near: dict[str, Any],
) -> str:
    """The model card, README.md."""
    from huggingface_hub import ModelCardData

    job, losses = job_output.training["job"], losses_of(job_output.training)
    if verdict is None:
        gate = f"**Not proved better than its base.** Published anyway, because: {unproved}\n"
    else:
        rows = "\n".join(
            f"| {metric} | {each['old']:.4g} | {each['new']:.4g} | {each['gain']:+.4g} "
            f"({each['interval'][0]:+.4g} to {each['interval'][1]:+.4g}) | {each['finding']} |"
            for metric, each in verdict["metrics"].items()
        )
        gate = (
            f"{verdict['verdict']}: {verdict['reasons'][0]}. Held-out set: sha256 `{verdict['data']['sha256']}`; "
            f"rule: sha256 `{verdict['rule']['sha256']}`.\n\n"
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
        base_model=job_output.base.name,
        library_name="transformers",
    )
    return (
        f"---\n{facts.to_yaml()}\n---\n# {name}\n\n"
        f"Base: `{job_output.base.name}`, manifest sha256 `{job_output.base_digest}`.\n"
        f"Learned: {'LoRA adapter' if job_output.is_adapter else 'all weights'}, manifest sha256 `{job_output.learned_digest}`.\n"
        f"Licence: {licence}, inherited from the base.\n{merging}\n"
        f"## Verdict\n{gate}\n"
        f"## Data\n```json\n{json.dumps(job_output.training.get('data', []), indent=1, sort_keys=True)}\n```\n\n"
        f"## Losses\n```json\n{json.dumps(losses, indent=1, sort_keys=True)}\n```\n\n"
        f"## Job\n```json\n{described}\n```\n"
    )


def licence_of(base: Path, option: str | None) -> str:
    """The licence of the base: as specified, from its card, or from the name of its LICENSE file; raises Refusal."""
    from huggingface_hub import ModelCard

    if option:
        return option
    if (path := base / "README.md").is_file():
        try:
            stated = ModelCard.load(path, ignore_metadata_errors=True).data
        except (ValueError, YAMLError) as error:
            raise Refusal(
                f"the header of {path} is not YAML ({error}): correct it, or specify --licence"
            ) from error
        if stated_name := stated.get("license_name") or stated.license:
            return str(stated_name)
    if own := [name for name in LICENCE_FILES if (base / name).is_file()]:
        return f"that of the base, see {own[0]}"
    raise Refusal(
        f"{base} does not state its licence, which a derived model inherits: specify it with --licence"
    )


def losses_of(training: dict[str, Any]) -> dict[str, Any]:
    """The first and the last logged loss of a job, by step, and the losses on its held-out rows."""
    logged = list((training.get("losses") or {}).items())
    losses = {"first": dict(logged[:1]), "last": dict(logged[-1:])}
    return losses | {name: training[name] for name in ("evaluations", "best") if training.get(name)}
