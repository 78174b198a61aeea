"""What the policy says: one object for each subject and action. The shape is checked, and nothing is guessed."""

import secrets
from dataclasses import dataclass, field


class PolicyUnavailable(Exception):
    """The policy engine gave no decision that may be relied on; the message says why, for the log."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate class: what one subject may use, in calendar minutes and UTC days.

    Where an engine is full, a higher `priority` goes first.
    """

    name: str
    requests_per_minute: int
    tokens_per_minute: int
    tokens_per_day: int
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """`models` None means all; `rule` names what decided. `id` tells evaluations apart in the audit record."""

    allow: bool
    reason: str
    rule: str
    revision: int
    models: frozenset[str] | None = frozenset()
    max_tokens: int = 0
    rate: Rate = Rate("none", 0, 0, 0)
    log_prompt: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def permits(self, model: str) -> bool:
        """Whether this model may be asked, or even be heard of."""
        return self.models is None or model in self.models


def number(answer: dict[str, object], name: str) -> int:
    """A whole number that is not negative; raises PolicyUnavailable."""
    value = answer.get(name)
    if type(value) is not int or value < 0:
        raise PolicyUnavailable(f"the decision's {name} is no whole number: {str(value)[:40]!r}")
    return value


def text(answer: dict[str, object], name: str) -> str:
    """A text; raises PolicyUnavailable."""
    value = answer.get(name)
    if not isinstance(value, str) or not value:
        raise PolicyUnavailable(f"the decision's {name} is no text: {str(value)[:40]!r}")
    return value


def parse_decision(answer: object) -> Decision:
    """A decision as the policy gave it; raises PolicyUnavailable for anything else. Allow is exactly `true`."""
    if not isinstance(answer, dict) or not isinstance(answer.get("allow"), bool):
        raise PolicyUnavailable("the policy engine answered with no decision")
    reason, rule, revision = text(answer, "reason"), text(answer, "rule"), number(answer, "revision")
    if answer["allow"] is not True:
        return Decision(False, reason, rule, revision)
    models, rate = answer.get("models"), answer.get("rate")
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise PolicyUnavailable("the decision's models are no list of names")
    if not isinstance(rate, dict) or not isinstance(answer.get("log_prompt"), bool):
        raise PolicyUnavailable("the decision lacks its rate or log_prompt")
    return Decision(
        allow=True,
        reason=reason,
        rule=rule,
        revision=revision,
        models=None if "*" in models else frozenset(models),
        max_tokens=number(answer, "max_tokens"),
        rate=Rate(
            text(answer, "rate_class"),
            number(rate, "requests_per_minute"),
            number(rate, "tokens_per_minute"),
            number(rate, "tokens_per_day"),
            number(rate, "priority") if "priority" in rate else 0,  # policies of former releases have none
        ),
        log_prompt=answer["log_prompt"] is True,
    )
