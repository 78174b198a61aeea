"""Experiments of the policy: which of two models answers a request for a name.

A unit's arm is an HMAC keyed by the experiment's salt, which the signed policy brings to every host: the same on all of them and
after each restart. The number that it gives is compared with the percentage, so a unit that has the candidate keeps it when the
percentage grows.
"""

import hmac
from dataclasses import dataclass
from typing import Literal

from llmserve.access.identity import Identity

Unit = Literal["subject", "request"]
Arm = Literal["control", "candidate"]
SPACE = 1 << 64


@dataclass(frozen=True, slots=True)
class Assigned:
    """The arm of one request. `unit`: a pseudonym of what is assigned, the same on all hosts.

    `away`: the candidate is not there, and the control answers in its place.
    """

    experiment: str
    model: str  # that the client asked for
    arm: Arm
    percent: int
    unit: str
    away: bool = False


@dataclass(frozen=True, slots=True)
class Experiment:
    """`percent` of the units that ask for `model` are answered by `candidate`, the others by `control`."""

    name: str
    model: str
    control: str
    candidate: str
    unit: Unit
    percent: int
    salt: str

    def assign(self, identity: Identity, transaction: str) -> Assigned:
        """The arm of a request; `transaction`: that of its exchange. The length of the tenant keeps `ab` and `c` apart from `a`
        and `bc`.
        """
        if self.unit == "subject":
            tenant = identity.tenant.encode()
            unit = b"%d %b%b" % (len(tenant), tenant, identity.subject.encode())
        else:
            unit = transaction.encode()
        digest = hmac.digest(self.salt.encode(), self.name.encode() + b"\0" + unit, "sha256")
        chosen = int.from_bytes(digest[:8]) * 100 < self.percent * SPACE
        arm: Arm = "candidate" if chosen else "control"
        return Assigned(self.name, self.model, arm, self.percent, digest[16:].hex())
