"""A guarded experiment, as the policy has it, and what gateways note of it."""

from typing import Any

from llmcore.experiments import identifier
from llmcore.ratings import RATED
from llmserve.access.experiments import Experiment

RAILS = {"slow_seconds": 5.0, "slow": 0.01, "failed": 0.01, "refused": 0.02, "length": 0.5}
METRICS = {"thumb": "higher", "corrected": "lower"}
ENTRY: dict[str, Any] = {
    "model": "support",
    "control": "support-7",
    "candidate": "m",
    "unit": "request",
    "tenants": ["research"],
    "percent": 50,
    "salt": "0123456789abcdef",
    "shadow": 0,
    "minimum": 30,
    "metrics": METRICS,
    "guardrails": RAILS | {"refusals": ["I cannot"]},
}
SUPPORT = Experiment("support-12", "support", "support-7", "m", "request", 50, ENTRY["salt"])


def lines(number: int, arm: str, unit: str, **more: Any) -> list[tuple[str, dict[str, Any]]]:
    """An assignment and its end, as gateways note them; `thumb`: a rating, too."""
    names = {"name": "support-12", "arm": arm, "percent": 50, "unit": unit}
    names["id"] = identifier("support-12", ENTRY["salt"])
    if "rater" in more:
        names["rater"] = more.pop("rater")
    shared: dict[str, Any] = {"transaction.id": str(number), "user.id": unit, "organization.id": "research"}
    shared |= {f"llmkeep.experiment.{name}": value for name, value in names.items()}
    ended = {"seconds": 0.1, "failed": False, "refused": False, "tokens": 100} | more
    thumb = ended.pop("thumb", None)
    found = [
        ("assigned", shared),
        ("ended", shared | {f"llmkeep.experiment.{name}": value for name, value in ended.items()}),
    ]
    return found + [(RATED, rating(number, thumb))] * (thumb is not None)


def rating(number: int, thumb: str) -> dict[str, Any]:
    return {"transaction.id": str(number), "user.id": "u", "llmkeep.feedback.thumb": thumb}
