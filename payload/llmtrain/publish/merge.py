"""Merging an adapter into its base, and the check that the merged model computes the same."""

import json
from pathlib import Path
from typing import Any

from llmtrain.exits import FAILED, Refusal
from llmtrain.publish.job_output import JobOutput

LOST = 0.25  # largest share of the adapter's effect on the logits that rounding may cancel; the gate judged the rounded weights
EXACT = 1e-3  # largest change by merging in float32, in units of the standard deviation of the logits
TEXTS = ("The capital of France is", "数据库中有多少个客户？", "SELECT name, count(*) FROM orders GROUP BY")


def merge(job_output: JobOutput, dtype: str, folder: Path) -> dict[str, Any]:
    """Write the merged model into `folder`; return how close its logits are. Raises Refusal if they are too far off."""
    import torch
    from transformers import AutoTokenizer

    from llmcore.adapters import logits, place
    from llmtrain.gate.scores import weights, whole

    tokenizer = AutoTokenizer.from_pretrained(
        str(job_output.base), local_files_only=True, trust_remote_code=False
    )
    most = weights_of(job_output.base).get("vocab_size", 2)
    prompts = [[token % most for token in tokenizer(text).input_ids] or [0] for text in TEXTS]

    def logits_of(model: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            each = [model(torch.tensor([prompt])).logits[0].double() for prompt in prompts]
        return [logits(model)[0].double(), *each]

    model = whole(job_output.base, job_output.learned, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    del model
    exported = logits_of(weights(folder, "float32"))  # as stored, rounded
    base = weights(job_output.base, "float32")
    before = logits_of(base)
    beside = place(base, "learned", job_output.learned).eval()
    expected = logits_of(beside)
    summed = logits_of(beside.merge_and_unload().eval())
    spread = max(float(each.std()) for each in expected)
    merging = (
        max(float((one - other).abs().max()) for one, other in zip(summed, expected, strict=True)) / spread
    )
    effect = sum(float((one - other).abs().mean()) for one, other in zip(expected, before, strict=True))
    rounding = sum(
        float((one - other).abs().mean()) for one, other in zip(exported, expected, strict=True)
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
    return {"prompts": len(expected), "merging": merging, "rounding": rounding, "dtype": dtype}


def weights_of(model: Path) -> dict[str, Any]:
    """The content of a model's config.json."""
    content: dict[str, Any] = json.loads((model / "config.json").read_bytes())
    return content
