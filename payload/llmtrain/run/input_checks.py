"""Checks that the model and the data of a job are unaltered and fit together: once per node, before any process starts."""

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
    """Digests of the base model, its tokenizer and the data."""

    revision: str
    tokenizer: str
    data: list[str]  # for training, and held out if there is such a set
    objective: str = "sft"  # or "dpo" or "kto": what the rows are for


def verify(job: Job) -> Verified:
    """Verify a job's inputs. Raises ManifestError for an altered model, and Refusal for data that is altered or unsuitable."""
    revision = verify_model(job.model, job.manifest or job.model.with_name(job.model.name + ".sha256"))
    sets = [Rows(each) for each in (job.data.train, job.data.eval) if each]
    for rows in sets:
        if job.data.verify:
            rows.verify()
        check_rows(rows, job)
    check_stop(sets[0], job.model)
    objective = sets[0].objective
    if len({rows.objective for rows in sets}) > 1:
        raise Refusal(
            f"data.train has rows for {objective}, but data.eval has rows for {sets[1].objective}: use the same kind for both"
        )
    return Verified(revision, sets[0].tokenizer, [rows.digest for rows in sets], objective)


def check_rows(rows: Rows, job: Job) -> None:
    """Raise Refusal for rows that were packed for another tokenizer, or that are too long for the model."""
    if (own := tokenizer_digest(job.model)) != rows.tokenizer:
        raise Refusal(
            f"{rows.directory} was packed for the tokenizer {rows.tokenizer[:16]}, but {job.model} has {own[:16]}: pack the data "
            f"again with this model's tokenizer"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(job.model), local_files_only=True, trust_remote_code=False)
    if rows.seq_len > config.max_position_embeddings:
        raise Refusal(
            f"{rows.directory} has rows of {rows.seq_len} tokens, {job.model} supports {config.max_position_embeddings}: "
            "pack the data again with shorter rows"
        )


def check_stop(rows: Rows, model: Path) -> None:
    """Raise Refusal unless the loss counts at some stop token.

    A model whose stop token was masked like padding never stops (DeepSeek-Coder #163, TRL #1623).
    """
    ends = sorted(stop_tokens(model))
    if any(numpy.isin(labels(row), ends).any() for row in rows):
        return
    raise Refusal(
        f"{rows.directory} has no row in which one of the model's stop tokens {ends} is learned: it would never stop; "
        "pack the data so that the end of each answer counts"
    )


def stop_tokens(model: Path) -> set[int]:
    """The tokens that end an answer, by the model's configuration, generation configuration and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokens: list[Any] = [
        AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False).eos_token_id
    ]
    if (model / "generation_config.json").is_file():
        tokens.append(GenerationConfig.from_pretrained(str(model), local_files_only=True).eos_token_id)
    tokens.append(
        AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=False).eos_token_id
    )
    return {
        token
        for each in tokens
        for token in (each if isinstance(each, list) else [each])
        if token is not None
    }
