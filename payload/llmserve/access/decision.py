"""Decisions of the policy: one object per subject and action, strictly validated."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date

from llmserve.access.aliases import Alias
from llmserve.access.experiments import OPENING, Experiment


class PolicyUnavailable(Exception):
    """The policy engine gave no valid decision; the message gives the reason, for the log."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate class: the quotas of one subject, per calendar minute and UTC day.

    When an engine is full, a higher `priority` is served first.
    """

    name: str
    requests_per_minute: int
    tokens_per_minute: int
    tokens_per_day: int
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """`models` None means all; `rule` names the rule that decided. `weight`: the tenant's share when an engine is full.
    `keep_prompts`: the tenant's prompts, answers and ratings may be kept as training data. `experiments`: those that the tenant
    takes part in, or all of them for the experiments page. `reviews`: tenants whose badly rated answers the subject's tenant
    reviews. `roles`: the subject's, including those of its groups. `aliases`: by name, for models that it may use. `collections`:
    collections that it may read; `writes`: collections in which it may add, list and remove documents. Both belong to its tenant.
    `id` identifies this evaluation in the audit record.
    """

    allow: bool
    reason: str
    rule: str
    revision: int
    models: frozenset[str] | None = frozenset()
    max_tokens: int = 0
    rate: Rate = Rate("none", 0, 0, 0)
    weight: int = 1
    log_prompt: bool = False
    keep_prompts: bool = False
    experiments: tuple[Experiment, ...] = ()
    reviews: frozenset[str] = frozenset()
    roles: tuple[str, ...] = ()
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    collections: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def permits(self, model: str) -> bool:
        """Whether this model may be used, and its existence revealed."""
        return self.models is None or model in self.models

    def experiment(self, model: str) -> Experiment | None:
        """The experiment about this model, or None."""
        return next((each for each in self.experiments if each.model == model), None)


def number(answer: dict[str, object], name: str) -> int:
    """A non-negative integer; raises PolicyUnavailable."""
    value = answer.get(name)
    if type(value) is not int or value < 0:
        raise PolicyUnavailable(f"the decision's {name} is not a non-negative integer: {str(value)[:40]!r}")
    return value


def text(answer: dict[str, object], name: str) -> str:
    """A non-empty string; raises PolicyUnavailable."""
    value = answer.get(name)
    if not isinstance(value, str) or not value:
        raise PolicyUnavailable(f"the decision's {name} is not a non-empty string: {str(value)[:40]!r}")
    return value


def parse_experiment(content: object) -> Experiment:
    """An experiment of the decision; raises PolicyUnavailable if it is invalid."""
    if not isinstance(content, dict):
        raise PolicyUnavailable("an experiment of the decision is not an object")
    unit, percent = content.get("unit"), number(content, "percent")
    if unit not in ("subject", "request") or percent > 100:
        raise PolicyUnavailable(
            f"an experiment's unit is {str(unit)[:40]!r} and its percentage {percent}: subject or request, 0 to 100"
        )
    refusals = content.get("refusals")
    if not isinstance(refusals, list) or not all(isinstance(each, str) and each for each in refusals):
        raise PolicyUnavailable("an experiment's refusals are not a list of texts with which refusals begin")
    return Experiment(
        text(content, "name"),
        text(content, "model"),
        text(content, "control"),
        text(content, "candidate"),
        unit,
        percent,
        text(content, "salt"),
        tuple(each.casefold().lstrip()[:OPENING] for each in refusals),
        number(content, "shadow"),
    )


def parse_alias(content: object) -> Alias:
    """An alias of the decision; raises PolicyUnavailable if it is invalid."""
    if not isinstance(content, dict):
        raise PolicyUnavailable("an alias of the decision is not an object")
    collections = content.get("collections", [])
    if not isinstance(collections, list) or not all(isinstance(name, str) for name in collections):
        raise PolicyUnavailable("an alias of the decision has collections that are not a list of names")
    days = {name: text(content, name) for name in ("deprecated", "sunset") if name in content}
    try:
        dates = {name: date.fromisoformat(day) for name, day in days.items()}
        return Alias(text(content, "model"), dates.get("deprecated"), dates.get("sunset"), tuple(collections))
    except ValueError:
        raise PolicyUnavailable(f"an alias of the decision has no valid days: {str(days)[:80]}") from None


def parse_decision(answer: object) -> Decision:
    """Parse the policy's decision; raises PolicyUnavailable if it is invalid. Only exactly `true` allows."""
    if not isinstance(answer, dict) or not isinstance(answer.get("allow"), bool):
        raise PolicyUnavailable("the policy engine's answer is not a decision")
    reason, rule, revision = text(answer, "reason"), text(answer, "rule"), number(answer, "revision")
    if answer["allow"] is not True:
        return Decision(False, reason, rule, revision)
    models, rate = answer.get("models"), answer.get("rate")
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise PolicyUnavailable("the decision's models are not a list of names")
    if not isinstance(rate, dict) or not isinstance(answer.get("log_prompt"), bool):
        raise PolicyUnavailable("the decision lacks its rate or log_prompt")
    weight = number(answer, "weight")
    if not weight:
        raise PolicyUnavailable("the decision's weight is 0, which would never be served")
    experiments = answer.get("experiments")
    if not isinstance(experiments, list):
        raise PolicyUnavailable("the decision's experiments are not a list")
    reviews = answer.get("reviews")
    if not isinstance(reviews, list) or not all(isinstance(tenant, str) for tenant in reviews):
        raise PolicyUnavailable("the decision's reviews are not a list of tenants")
    # An estate's own rules may be older than these; without them there are none.
    roles, aliases, collections, writes = (
        answer.get("roles", []),
        answer.get("aliases", {}),
        answer.get("collections", []),
        answer.get("writes", []),
    )
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise PolicyUnavailable("the decision's roles are not a list of names")
    if not isinstance(aliases, dict):
        raise PolicyUnavailable("the decision's aliases are not an object")
    for field_name, names in (("collections", collections), ("writes", writes)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PolicyUnavailable(f"the decision's {field_name} are not a list of names")
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
            number(rate, "priority"),
        ),
        weight=weight,
        log_prompt=answer["log_prompt"] is True,
        keep_prompts=answer.get("keep_prompts") is True,
        experiments=tuple(parse_experiment(each) for each in experiments),
        reviews=frozenset(reviews),
        roles=tuple(roles),
        aliases={name: parse_alias(each) for name, each in aliases.items()},
        collections=frozenset(collections),
        writes=frozenset(writes),
    )
