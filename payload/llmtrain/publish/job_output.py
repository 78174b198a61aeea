"""The output of a finished job, and the gate's verdict on it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore.manifest import verified
from llmtrain.exits import ALTERED, NOT_BETTER, Refusal


@dataclass(frozen=True)
class JobOutput:
    """The verified output of a job: the base, and the trained adapter or model."""

    training: dict[str, Any]
    base: Path
    base_digest: str
    learned: Path
    learned_digest: str
    is_adapter: bool


def read_job_output(output: Path) -> JobOutput:
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
    return JobOutput(training, base, base_digest, learned, verified(learned), is_adapter)


def judged(path: Path, job_output: JobOutput, unproved: str | None) -> dict[str, Any] | None:
    """The verdict, if it is `promote` for exactly these weights; None if `unproved` is a reason to publish without one."""
    expected = {
        "model": job_output.base_digest if job_output.is_adapter else job_output.learned_digest,
        "adapter": job_output.learned_digest if job_output.is_adapter else None,
    }
    if unproved is not None:
        if not unproved.strip():
            raise Refusal("--unproved is empty: give a reason, which the model's card will show")
        return None
    try:
        verdict: dict[str, Any] = json.loads(path.read_bytes())
        actual, outcome = {key: verdict["new"][key] for key in expected}, str(verdict["verdict"])
    except OSError as error:
        raise Refusal(
            f"there is no verdict at {path}: run `llm-train compare`, or use --unproved REASON"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{path} is not a verdict ({error!r}): run `llm-train compare` again") from error
    if actual != expected:
        raise Refusal(
            f"the verdict {path} is about other weights: its NEW is {actual}, this is {expected}; "
            "run `llm-train compare` for these",
            NOT_BETTER,
        )
    if outcome != "promote":
        raise Refusal(
            f"the verdict {path} is {outcome}: {verdict.get('reasons', ['no reason'])[0]}. "
            "Train further, or use --unproved REASON",
            NOT_BETTER,
        )
    return verdict
