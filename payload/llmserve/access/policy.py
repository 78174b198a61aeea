"""Authorization by the policy: without a valid decision, the answer is no.

Decisions are cached for a few seconds by subject, roles, groups, tenant and action; a decision lists the permitted models, so
one covers all of them. A new revision clears the cache. A decision of an earlier revision than the highest seen is
invalid.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path

from llmcore.config import ConfigError
from llmcore.files import write_aside
from llmserve.access.break_glass import BreakGlass
from llmserve.access.decision import Decision, PolicyUnavailable, parse_decision
from llmserve.access.identity import Identity
from llmserve.access.opa import PolicyEngine
from llmserve.api.errors import ApiError, unavailable
from llmserve.metrics import Metrics

log = logging.getLogger("llmserve.policy")
# How long a decision is cached, and hence how long a change of roles may take without a new revision.
ALLOWED_SECONDS = 5.0
DENIED_SECONDS = 1.0
KEPT = 10_000
# No such action exists, so it is always denied; the decision reveals the active revision.
PROBE: dict[str, object] = {"subject": "llm-gateway", "tenant": "", "roles": [], "action": "PROBE"}


class Policy:
    """Decisions, cached or fresh. `ready` while the engine returns valid decisions."""

    def __init__(
        self, engine: PolicyEngine, metrics: Metrics, revision_file: Path | None, glass: BreakGlass | None
    ) -> None:
        """`revision_file`: file that preserves the highest revision across restarts."""
        self.engine = engine
        self.metrics = metrics
        self.revision_file = revision_file
        self.glass = glass
        self.revision = read_revision(revision_file)
        self.ready = False
        self.trouble = "not probed yet"
        self.decisions: OrderedDict[Hashable, tuple[float, Decision]] = OrderedDict()
        self.changed: Callable[[], None] = lambda: None

    async def decide(self, identity: Identity, action: str) -> Decision:
        """The decision for a subject, allowed or not; raises ApiError 503 if there is none."""
        key = (identity.subject, identity.roles, identity.groups, identity.tenant, action)
        now = time.monotonic()
        entry = self.decisions.get(key)
        if entry is not None and now < entry[0]:
            return entry[1]
        decision = await self.fresh(identity, action)
        if decision.rule != "break_glass":
            self.keep(key, now + (ALLOWED_SECONDS if decision.allow else DENIED_SECONDS), decision)
        return decision

    def keep(self, key: Hashable, until: float, decision: Decision) -> None:
        """Cache a decision, evicting the oldest if there are too many."""
        self.decisions[key] = until, decision
        self.decisions.move_to_end(key)
        if len(self.decisions) > KEPT:
            self.decisions.popitem(last=False)

    async def fresh(self, identity: Identity, action: str) -> Decision:
        """Evaluate the policy, or fall back to break-glass; raises ApiError 503."""
        query: dict[str, object] = {
            "subject": identity.subject,
            "tenant": identity.tenant,
            "roles": list(identity.roles),
            "groups": list(identity.groups),
            "action": action,
        }
        try:
            decision = await self.ask(query)
        except PolicyUnavailable as error:
            self.fail(error)
            grant = self.glass.grant(identity, action) if self.glass else None
            if grant is None:
                raise policy_unavailable() from None
            self.metrics.break_glass.inc()
            return grant
        self.metrics.decisions.labels("allow" if decision.allow else "deny").inc()
        return decision

    async def ask(self, query: dict[str, object]) -> Decision:
        """A decision of a valid revision; raises PolicyUnavailable."""
        decision = parse_decision(await self.engine.evaluate(query))
        if decision.revision < max(1, self.revision):
            raise PolicyUnavailable(
                f"revision {decision.revision} is older than {max(1, self.revision)}, the highest seen"
            )
        if decision.rule == "policy_expired":
            raise PolicyUnavailable(f"policy revision {decision.revision} has expired")
        if decision.revision > self.revision:
            self.advance(decision.revision)
        self.ready, self.trouble = True, ""
        self.metrics.policy_revision.set(self.revision)
        return decision

    def advance(self, revision: int) -> None:
        """Store a new revision durably, and drop decisions of older ones. Raises PolicyUnavailable if it cannot be stored."""
        if self.revision_file:
            try:
                write_aside(self.revision_file, f"{revision}\n")
            except OSError as error:
                reason = f"revision {revision} cannot be stored in {self.revision_file}: {error.strerror}"
                raise PolicyUnavailable(reason) from None
        log.info("policy revision", extra={"fields": {"from": self.revision, "to": revision}})
        self.revision = revision
        self.decisions.clear()
        self.changed()

    def fail(self, error: PolicyUnavailable) -> None:
        """Count the failure, and log it if its reason is new."""
        self.metrics.decisions.labels("unavailable").inc()
        self.ready = False
        if str(error) != self.trouble:
            self.trouble = str(error)
            log.error(
                "no policy decision: every request is rejected", extra={"fields": {"reason": str(error)}}
            )

    async def watch(self, seconds: float) -> None:
        """Probe the engine every `seconds`; runs until cancelled."""
        while True:
            await self.probe()
            await asyncio.sleep(seconds)

    async def probe(self) -> None:
        """Check that the engine decides, and which revision it uses."""
        try:
            await self.ask(PROBE)
        except PolicyUnavailable as error:
            self.fail(error)
            self.decisions.clear()  # cached decisions do not outlive the engine
        self.metrics.break_glass_armed.set(int(self.glass is not None and self.glass.active()))


def read_revision(file: Path | None) -> int:
    """The highest revision seen; 0 if there is none. Raises ConfigError for an invalid file."""
    if file is None or not file.exists():
        return 0
    content = file.read_text(encoding="ascii", errors="replace").strip()
    if not content.isdecimal():
        raise ConfigError(
            f"{file} contains {content[:40]!r} instead of the highest policy revision: write the control node's into it"
        )
    return int(content)


def denied(decision: Decision) -> ApiError:
    """403, with the rule that decided."""
    message = f"{decision.reason} (rule {decision.rule}, policy revision {decision.revision}): request a role that is allowed to"
    return ApiError(403, "denied", message)


def policy_unavailable() -> ApiError:
    return unavailable(
        "policy_unavailable", "the policy is unavailable, so nothing is allowed: retry later", 2
    )
