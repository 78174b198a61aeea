"""`llm-train publish JOB_OUTPUT --into DIR`: make a servable model, a release candidate, of a job's output.

DIR gets models/NAME, a complete model with its card, and models/NAME.sha256, its manifest. On the control node,
`llmkeep release sign DIR` makes a release of it. An adapter is merged into the base's weights, and the result is only kept if
its logits are those of the unmerged adapter: rounding to few bits can cancel a small adapter, and some architectures do not
compute with the weights that the adapter changes.
"""

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore.manifest import verified, write_manifest
from llmtrain.exits import ALTERED, DONE, FAILED, NO_SPACE, NOT_BETTER, Refusal

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
LOST = 0.25  # largest share of the adapter's effect on the logits that rounding may cancel; the gate judged the rounded weights
EXACT = 1e-3  # largest change by merging in float32, in units of the standard deviation of the logits
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
TEXTS = ("The capital of France is", "数据库中有多少个客户？", "SELECT name, count(*) FROM orders GROUP BY")


@dataclass(frozen=True)
class Work:
    """The verified output of a job: the base, and the trained adapter or model."""

    training: dict[str, Any]
    base: Path
    base_digest: str
    learned: Path
    learned_digest: str
    is_adapter: bool


def work(output: Path) -> Work:
    """Read and verify the output of a job; raises Refusal or ManifestError."""
    try:
        training = json.loads((output / "training.json").read_bytes())
        base, revision = Path(training["job"]["model"]), str(training["base_model"]["revision"])
        manifest = training["job"].get("manifest")
    except OSError as error:
        raise Refusal(
            f"cannot read {output}/training.json: {error.strerror}; give the output of a finished job"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(
            f"{output}/training.json does not name the job and its base ({error!r}): run the job again"
        ) from error
    is_adapter = (output / "adapter").is_dir()
    learned = output / ("adapter" if is_adapter else "model")
    if not learned.is_dir():
        raise Refusal(f"{output} has neither adapter nor model: give the output of a finished job")
    base_digest = verified(base, Path(manifest) if manifest else None)
    if base_digest[:16] != revision:
        raise Refusal(
            f"{base} is not the model that was trained: its revision is {base_digest[:16]}, training.json says {revision}; "
            "restore that model",
            ALTERED,
        )
    return Work(training, base, base_digest, learned, verified(learned), is_adapter)


def judged(path: Path, done: Work, unproved: str | None) -> dict[str, Any] | None:
    """The verdict, if it is `promote` for exactly these weights; None if `unproved` is a reason to publish without one."""
    wanted = {
        "model": done.base_digest if done.is_adapter else done.learned_digest,
        "adapter": done.learned_digest if done.is_adapter else None,
    }
    if unproved is not None:
        if not unproved.strip():
            raise Refusal("--unproved is empty: give a reason, which the model's card will show")
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        seen, said = {key: found["new"][key] for key in wanted}, str(found["verdict"])
    except OSError as error:
        raise Refusal(
            f"there is no verdict at {path}: run `llm-train compare`, or use --unproved REASON"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{path} is not a verdict ({error!r}): run `llm-train compare` again") from error
    if seen != wanted:
        raise Refusal(
            f"the verdict {path} is about other weights: its NEW is {seen}, this is {wanted}; run `llm-train compare` for these",
            NOT_BETTER,
        )
    if said != "promote":
        raise Refusal(
            f"the verdict {path} is {said}: {found.get('reasons', ['no reason'])[0]}. Train further, or use --unproved REASON",
            NOT_BETTER,
        )
    return found


def merge(done: Work, dtype: str, folder: Path) -> dict[str, Any]:
    """Write the merged model into `folder`; return how close its logits are. Raises Refusal if they are too far off."""
    import torch
    from transformers import AutoTokenizer

    from llmcore.adapters import logits, place
    from llmtrain.gate.scores import weights, whole

    tokenizer = AutoTokenizer.from_pretrained(str(done.base), local_files_only=True)
    most = weights_of(done.base).get("vocab_size", 2)
    prompts = [[token % most for token in tokenizer(text).input_ids] or [0] for text in TEXTS]

    def said(model: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            each = [model(torch.tensor([prompt])).logits[0].double() for prompt in prompts]
        return [logits(model)[0].double(), *each]

    model = whole(done.base, done.learned, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    del model
    exported = said(weights(folder, "float32"))  # as stored, rounded
    base = weights(done.base, "float32")
    before = said(base)
    beside = place(base, "learned", done.learned).eval()
    wanted = said(beside)
    summed = said(beside.merge_and_unload().eval())
    spread = max(float(each.std()) for each in wanted)
    merging = (
        max(float((one - other).abs().max()) for one, other in zip(summed, wanted, strict=True)) / spread
    )
    effect = sum(float((one - other).abs().mean()) for one, other in zip(wanted, before, strict=True))
    rounding = sum(
        float((one - other).abs().mean()) for one, other in zip(exported, wanted, strict=True)
    ) / max(effect, 1e-30)
    if not merging <= EXACT:
        raise Refusal(
            f"the logits of the merged and the unmerged adapter differ by {merging:.2g} of their spread, allowed is "
            f"{EXACT:g}: this architecture does not compute with the weights that the adapter changes; serve it unmerged",
            FAILED,
        )
    if not rounding <= LOST:
        raise Refusal(
            f"the merged weights lose {rounding:.0%} of the adapter's effect, allowed is {LOST:.0%}: rounding to {dtype} "
            "cancels it; publish with --dtype float32, or train it further",
            FAILED,
        )
    return {"prompts": len(wanted), "merging": merging, "rounding": rounding, "dtype": dtype}


def weights_of(model: Path) -> dict[str, Any]:
    """The content of a model's config.json."""
    content: dict[str, Any] = json.loads((model / "config.json").read_bytes())
    return content


def licence_of(base: Path, given: str | None) -> str:
    """The licence of the base: as given, by its card, or by the name of its LICENSE file; raises Refusal."""
    if given:
        return given
    card = base / "README.md"
    if card.is_file() and (found := re.search(r"^license:\s*(\S+)\s*$", card.read_text(), re.MULTILINE)):
        return found[1]
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


def card(
    name: str,
    done: Work,
    licence: str,
    found: dict[str, Any] | None,
    unproved: str | None,
    near: dict[str, Any],
) -> str:
    """The model card, README.md."""
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
    return (
        f"---\nlicense: {json.dumps(licence)}\n---\n# {name}\n\n"
        f"Base: `{done.base.name}`, manifest sha256 `{done.base_digest}`.\n"
        f"Learned: {'LoRA adapter' if done.is_adapter else 'all weights'}, manifest sha256 `{done.learned_digest}`.\n"
        f"Licence: {licence}, which the base has.\n{merging}\n"
        f"## Verdict\n{gate}\n"
        f"## Data\n```json\n{json.dumps(done.training.get('data', []), indent=1, sort_keys=True)}\n```\n\n"
        f"## Losses\n```json\n{json.dumps(losses, indent=1, sort_keys=True)}\n```\n\n"
        f"## Job\n```json\n{described}\n```\n"
    )


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
    done = work(output)
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


def run(options: argparse.Namespace) -> int:
    name = options.name or options.output.resolve().name
    verdict = options.verdict or options.output / "verdict.json"
    more = options.unproved, options.dtype, options.licence
    print(
        f"{publish(options.output, options.into, name, verdict, *more)}: sign it on the control node with llmkeep release sign"
    )
    return DONE


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "publish",
        help="make a complete model of a job's output: a release candidate",
        description=__doc__,
    )
    parser.add_argument("output", type=Path, metavar="JOB_OUTPUT", help="`output` of the job")
    parser.add_argument("--into", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--name", help="name of the model; default: that of JOB_OUTPUT")
    parser.add_argument(
        "--verdict", type=Path, help="verdict of llm-train compare; default: JOB_OUTPUT/verdict.json"
    )
    parser.add_argument(
        "--unproved", metavar="REASON", help="publish without a promotion; the card shows the reason"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="dtype of merged weights; auto: that of the base",
    )
    parser.add_argument("--licence", help="licence of the base, if its directory does not state it")
    parser.set_defaults(run=run)
