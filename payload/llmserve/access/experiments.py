"""Experiments of the policy: choose which of two models answers a request for a name.

A unit's arm is an HMAC keyed by the experiment's salt, which the signed policy brings to every host, so it is the same on all
hosts and after each restart. The resulting number is compared with the percentage, so a unit that has the candidate keeps it when
the percentage grows.
"""

import hmac
from dataclasses import dataclass, field
from typing import Literal

from llmcore.experiments import identifier
from llmserve.access.identity import Identity

Unit = Literal["subject", "request"]
Arm = Literal["control", "candidate"]
Away = Literal["", "down", "halted", "unwatched"]
SPACE = 1 << 64
OPENING = 40  # characters of an answer, by which it may be a refusal


@dataclass(frozen=True, slots=True)
class Assigned:
    """The arm of one request. `unit`: a pseudonym of the assigned unit, the same on all hosts; `rater`: a pseudonym of the
    subject, whose ratings are not independent, whatever the unit is.

    `away`: why the control answers in the candidate's place: its engine is down, the experiment was halted on this host, or
    nothing watches it there.
    """

    experiment: str
    id: str
    model: str  # that the client asked for
    arm: Arm
    percent: int
    unit: str
    rater: str
    away: Away = ""
    refusals: tuple[str, ...] = ()
    shadowed: bool = False  # the candidate may be asked a copy
    shadow: str = ""  # of a copy: the transaction of what it copies

    @property
    def compares(self) -> bool:
        """Whether there is another arm, or a shadow copy, to compare with."""
        return 0 < self.percent < 100 or self.shadowed

    @property
    def counts(self) -> bool:
        """Whether the request is an outcome of its arm that can be compared."""
        return not self.away and self.compares


@dataclass(frozen=True, slots=True)
class Experiment:
    """`percent` of the units that ask for `model` are answered by `candidate`, the others by `control`.

    `refusals`: texts with which a refusal begins, in lower case.
    """

    name: str
    model: str
    control: str
    candidate: str
    unit: Unit
    percent: int
    salt: str
    refusals: tuple[str, ...] = ()
    shadow: int = 0  # percent of the control's answers of which the candidate is asked a copy
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", identifier(self.name, self.salt))

    def assign(self, identity: Identity, transaction: str) -> Assigned:
        """The arm of a request; `transaction`: that of its exchange. The length of the tenant keeps `ab` and `c` apart from `a`
        and `bc`.
        """
        tenant = identity.tenant.encode()
        rater = self.digest(b"%d %b%b" % (len(tenant), tenant, identity.subject.encode()))
        digest = rater if self.unit == "subject" else self.digest(transaction.encode())
        chosen = int.from_bytes(digest[:8]) * 100 < self.percent * SPACE
        arm: Arm = "candidate" if chosen else "control"
        return Assigned(
            self.name,
            self.id,
            self.model,
            arm,
            self.percent,
            digest[16:].hex(),
            rater[16:].hex(),
            "",
            self.refusals,
            self.shadow > 0,
        )

    def digest(self, unit: bytes) -> bytes:
        return hmac.digest(self.salt.encode(), self.name.encode() + b"\0" + unit, "sha256")
