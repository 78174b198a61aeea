"""Summarizes a GPU's Xid events and the host's reboots: a pure fold, so that its state can be stored in place of the events, and
stays small however many there are.

A reboot clears an Xid only if a reset or reboot was its advice. If the same Xid is back after two reboots that had
cleared it, the advice becomes an inspection of the hardware, which only `Repaired` clears. The rule is that of gpud
(leptonai/gpud, components/accelerator/nvidia/xid/health_state.go, Apache-2.0), none of whose code is used.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from llmgpu.xids import TABLE, Action

REBOOTS = 2


@dataclass(frozen=True, slots=True)
class Happened:
    """An Xid event of this GPU."""

    code: int


@dataclass(frozen=True, slots=True)
class Rebooted:
    """The host was rebooted."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """An operator declares that this GPU was reset, repaired or inspected."""


Event = Happened | Rebooted | Repaired


@dataclass(frozen=True, slots=True)
class Seen:
    """State of one code: whether it asks for an action now, and how many reboots have cleared it so far."""

    active: bool
    reboots: int = 0


State = Mapping[int, Seen]  # by code; only those of the table that drain
HEALTHY: State = {}


def advice(code: int, xid: Seen) -> Action:
    """The action that `code` asks for in this state."""
    if not xid.active:
        return "none"
    return "inspect" if xid.reboots >= REBOOTS else TABLE[code].action


def after(state: State, event: Event) -> State:
    """The state after one more event."""
    match event:
        case Repaired():
            return HEALTHY
        case Rebooted():
            return {
                code: Seen(False, xid.reboots + 1) if advice(code, xid) in ("reset", "reboot") else xid
                for code, xid in state.items()
            }
        case Happened(code):
            if code not in TABLE or not TABLE[code].drains:
                return state
            return {**state, code: replace(state.get(code, Seen(True)), active=True)}


def replay(events: Iterable[Event], state: State = HEALTHY) -> State:
    """The state after all of `events`, in their order."""
    return reduce(after, events, state)


def pending(state: State) -> dict[int, Action]:
    """The codes that keep this GPU from serving, each with its advice; empty if none does."""
    return {code: advice(code, xid) for code, xid in sorted(state.items()) if xid.active}
