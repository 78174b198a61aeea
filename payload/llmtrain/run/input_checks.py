"""What a job trains with is what was made for it, unaltered: looked at once a node, before any process starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from llmcore.manifest import verify_model
from llmtrain.data.rows import Rows, tokenizer_digest
from llmtrain.exits import Refusal
from llmtrain.job import Job
from llmtrain.run.batches import labels


@dataclass(frozen=True)
class Verified:
    """By their content: the base model, its tokenizer and the data."""

    revision: str
    tokenizer: str
    data: list[str]  # learned from, and held out if there is such


def verify(job: Job) -> Verified:
    """Raises ManifestError for an altered model, and Refusal for data that is altered, or not for it."""
    revision = verify_model(job.model, job.manifest or job.model.with_name(job.model.name + ".sha256"))
    sets = [Rows(each) for each in (job.data.train, job.data.eval) if each]
    for rows in sets:
        if job.data.verify:
            rows.verify()
        check_rows(rows, job)
    check_stop(sets[0], job.model)
    return Verified(revision, sets[0].tokenizer, [rows.digest for rows in sets])


def check_rows(rows: Rows, job: Job) -> None:
    """Raises Refusal for rows that are not for this model, or too long for it, or from which it cannot learn to stop."""
    if (own := tokenizer_digest(job.model)) != rows.tokenizer:
        raise Refusal(
            f"{rows.directory} was packed for the tokenizer {rows.tokenizer[:16]}, {job.model} has {own[:16]}: pack the data "
            "again with this model's"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(job.model), local_files_only=True)
    if rows.seq_len > config.max_position_embeddings:
        raise Refusal(
            f"{rows.directory} has rows of {rows.seq_len} tokens, {job.model} was made for {config.max_position_embeddings}: "
            "pack the data again with shorter rows"
        )


def check_stop(rows: Rows, model: Path) -> None:
    """Raises Refusal unless a token that ends an answer is learned somewhere.

    Many a model never stops because its end was masked like padding (DeepSeek-Coder #163, TRL #1623).
    """
    ends = sorted(stop_tokens(model))
    if any(numpy.isin(labels(row), ends).any() for row in rows):
        return
    raise Refusal(
        f"nowhere in {rows.directory} one of the model's stop tokens {ends} is learned: it would never stop; "
        "pack the data so that each answer's end counts"
    )


def stop_tokens(model: Path) -> set[int]:
    """What ends an answer, says the model's configuration or its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    told: list[Any] = [AutoConfig.from_pretrained(str(model), local_files_only=True).eos_token_id]
    if (model / "generation_config.json").is_file():
        told.append(GenerationConfig.from_pretrained(str(model), local_files_only=True).eos_token_id)
    told.append(AutoTokenizer.from_pretrained(str(model), local_files_only=True).eos_token_id)
    return {
        token for each in told for token in (each if isinstance(each, list) else [each]) if token is not None
    }
