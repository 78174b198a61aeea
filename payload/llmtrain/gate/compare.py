"""`llm-train compare OLD NEW`: both models answer the same held-out set, and a rule says promote, hold or reject."""

import argparse
import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from llmcore.config import load as load_config
from llmcore.files import write_aside
from llmcore.manifest import verified
from llmcore.privileges import become_owner
from llmtrain.data.rows import tokenizer_digest
from llmtrain.exits import DONE, NOT_BETTER, Refusal
from llmtrain.gate import held_out, verdict
from llmtrain.gate.held_out import HeldOut
from llmtrain.gate.verdict import Paired, Rule

if TYPE_CHECKING:
    from llmtrain.gate.scores import Subject


@dataclass(frozen=True)
class Candidate:
    """A verified model, or a verified model with an adapter. `digests` are the sha256 of their manifests."""

    side: str
    model: Path
    adapter: Path | None
    digests: dict[str, str | None]


def parts(text: str) -> tuple[Path, Path | None]:
    """The directories that MODEL or MODEL+ADAPTER names."""
    model, adapter = Path(text), None
    if not model.is_dir() and "+" in text:
        before, _, after = text.rpartition("+")
        model, adapter = Path(before), Path(after)
    return model, adapter


def candidate(side: str, text: str) -> Candidate:
    """The candidate that MODEL or MODEL+ADAPTER names, verified. Raises Refusal or ManifestError."""
    model, adapter = parts(text)
    for path in (model, adapter):
        if path is not None and not path.is_dir():
            raise Refusal(f"{side} is {text}, but there is no directory {path}: give MODEL or MODEL+ADAPTER")
    digests = {"model": verified(model), "adapter": verified(adapter) if adapter else None}
    return Candidate(side, model, adapter, digests)


def compare(old: Candidate, new: Candidate, data: HeldOut, rule: Rule, dtype: str) -> dict[str, Any]:
    """Evaluate both candidates; return the content of verdict.json. Raises Refusal if the set is too small."""
    if short := verdict.too_small(rule, data.rows):
        raise Refusal(f"{short}: add rows, or allow a wider margin in the rule")
    provenance = [held_out.refuse_learned(data, each.adapter or each.model) for each in (old, new)]
    same_tokens = tokenizer_digest(old.model) == tokenizer_digest(new.model)
    from llmtrain.gate.scores import load

    sides = [load(each.side, each.model, each.adapter, dtype) for each in (old, new)]
    metrics, more = paired(sides, data, rule)
    pace = alternating(sides, data, rule)
    outcome, reasons, measures = verdict.judge(metrics, pace.as_json(rule), rule, old.digests == new.digests)
    if more:
        # Tokens of different tokenizers cannot be compared, only bytes.
        more = more if same_tokens else {"perplexity_per_token": None}
        if not same_tokens:
            reasons.append("perplexity: the tokenizers differ, so it is reported and judged per byte only")
    if not provenance[1]:
        reasons.append("NEW's training files are not recorded, so this set may be among them")
    settings = rule.model_dump(mode="json")
    return {
        "verdict": outcome,
        "reasons": reasons,
        "old": {
            **old.digests,
            "path": str(old.model),
            "adapter_path": str(old.adapter) if old.adapter else None,
        },
        "new": {
            **new.digests,
            "path": str(new.model),
            "adapter_path": str(new.adapter) if new.adapter else None,
        },
        "data": {"sha256": data.sha256, "rows": data.rows},
        "rule": {
            "sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
            **settings,
        },
        "metrics": measures,
        **more,
        "speed": pace.as_json(rule),
        "dtype": dtype,
        "device": str(sides[0].model.device),
    }


def progress(side: str, what: str, of: int) -> Any:
    """Show the progress on a terminal."""

    def show(count: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\r{side}: {what} {count} of {of} ",
                end="" if count < of else "\n",
                file=sys.stderr,
                flush=True,
            )

    return show


def paired(sides: list["Subject"], data: HeldOut, rule: Rule) -> tuple[list[Paired], dict[str, Any]]:
    """The scores of both models by metric, row by row; and their perplexity per token, if the set has texts."""
    from llmtrain.gate import scores

    values: dict[str, list[list[float]]] = {name: [[], []] for name in data.rows}
    tokens = [0, 0]
    for number, side in enumerate(sides):
        if data.answers:
            show = progress(side.side, "answers", len(data.answers))
            answers = side.answers(data.answers, rule.max_tokens, rule.batch, show)
            for text, row in zip(answers, data.answers, strict=True):
                values["exact"][number].append(scores.exact(text, row.answer))
                values["f1"][number].append(scores.f1(text, row.answer))
        show = progress(side.side, "choices", len(data.choices))
        for position, row in enumerate(data.choices, 1):
            raw, normalised = scores.chosen(side.choices(row), row)
            values["choice"][number].append(raw)
            values["choice_normalised"][number].append(normalised)
            show(position)
        show = progress(side.side, "texts", len(data.texts))
        for position, text in enumerate(data.texts, 1):
            bits, count = side.bits(text, rule.context)
            values["bits_per_byte"][number].append(bits)
            tokens[number] += count
            show(position)
    margins = rule.margins.model_dump()
    sizes = numpy.array([float(len(text.encode())) for text in data.texts])
    metrics = []
    for name, (before, after) in values.items():
        of_text = name == "bits_per_byte"
        weights = sizes if of_text else None
        metrics.append(Paired(name, numpy.array(before), numpy.array(after), margins[name], weights, of_text))
        if not numpy.isfinite(metrics[-1].old).all():
            raise Refusal(f"OLD's scores for {name} are NaN: there is nothing to compare NEW with")
    more: dict[str, Any] = {}
    if data.texts:
        bits_of = [sum(values["bits_per_byte"][number]) for number in (0, 1)]
        each = [
            2 ** (bits / max(1, count)) if bits / max(1, count) < 1000 else None  # NaN is None, too
            for bits, count in zip(bits_of, tokens, strict=True)
        ]
        more["perplexity_per_token"] = {"old": each[0], "new": each[1]}
    return metrics, more


def alternating(sides: list["Subject"], data: HeldOut, rule: Rule) -> verdict.Pace:
    """Seconds of both models for the same prompts, in alternating order, so that a warming machine favors neither."""
    from llmtrain.gate.held_out import Asked

    rows = (data.answers + data.choices) or [
        Asked(0, text[:200], [{"role": "user", "content": text[:200]}]) for text in data.texts
    ]
    chosen = random.Random(rule.seed).sample(rows, min(rule.speed.prompts, len(rows)))  # noqa: S311 - a sample
    prompts = [[side.prompt(row) for row in chosen] for side in sides]
    seconds: list[list[list[float]]] = [[], []]
    for turn in range(rule.speed.rounds):
        for number in (0, 1) if turn % 2 else (1, 0):
            side = sides[number]
            seconds[number].append([side.seconds(prompt, rule.speed.tokens) for prompt in prompts[number]])
    old, new = (numpy.array(side[1:]) for side in seconds)
    return verdict.Pace(old, new, rule.speed.tokens)


def text_of(result: dict[str, Any]) -> str:
    """The verdict as text."""
    lines = [
        f"{result['verdict']}: {result['reasons'][0]}",
        *(f"  {reason}" for reason in result["reasons"][1:]),
    ]
    for side in ("old", "new"):
        pace = result["speed"][side]
        lines.append(
            f"  {side.upper()}: latency p50 {pace['p50_seconds']:.3f} s, p95 {pace['p95_seconds']:.3f} s, "
            f"{pace['tokens_per_second']:.1f} tokens/s"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    # What root alone can change, root reads: the held-out set, of which jobs know nothing.
    become_owner(options.data, *filter(None, [options.rule]))
    rule = load_config(options.rule, Rule) if options.rule else Rule()
    data = held_out.read(options.data)
    become_owner(*filter(None, [*parts(options.old), *parts(options.new), options.out]))
    result = compare(candidate("OLD", options.old), candidate("NEW", options.new), data, rule, options.dtype)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if options.out:
        write_aside(options.out, text)
    print(text if options.json else text_of(result), end="" if options.json else "\n")
    return DONE if result["verdict"] == "promote" else NOT_BETTER


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="decide whether NEW is better than OLD: promote (exit code 0), hold or reject (8)",
        description=__doc__,
    )
    parser.add_argument(
        "old", metavar="OLD", help="a model's directory, or MODEL+ADAPTER, each with its manifest"
    )
    parser.add_argument("new", metavar="NEW", help="like OLD")
    parser.add_argument(
        "--data", type=Path, required=True, help="the held-out set, JSON lines (docs/use/training-gate.md)"
    )
    parser.add_argument("--rule", type=Path, help="gate.yaml; default: a rule that is part of the verdict")
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: that of the weights"
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument("--out", type=Path, help="write the verdict to this file, for `llm-train publish`")
    parser.set_defaults(run=run)
