"""Xids and reboots, replayed: what each GPU is then advised to."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgpu import history
from llmgpu.history import Event, Happened, Rebooted, Repaired, pending, replay
from llmgpu.xids import OTHER, TABLE, label

DRAINING = sorted(code for code, xid in TABLE.items() if xid.drains)
REBOOTABLE = sorted(code for code in DRAINING if TABLE[code].cleared_by_reboot)
HARMLESS = sorted(code for code, xid in TABLE.items() if not xid.drains)
events = st.lists(
    st.one_of(
        st.builds(Happened, st.sampled_from([*TABLE, 0, 4711])), st.just(Rebooted()), st.just(Repaired())
    ),
    max_size=40,
)


@pytest.mark.parametrize("code", [13, 31, 43, 45, 94])
def test_an_applications_xid_never_quarantines(code: int) -> None:
    assert pending(replay([Happened(code)] * 1000)) == {}


def test_a_gpu_that_fell_off_the_bus_is_cleared_by_a_reboot() -> None:
    assert pending(replay([Happened(79)])) == {79: "reboot"}
    assert pending(replay([Happened(79), Rebooted()])) == {}


def test_an_xid_that_asks_for_an_inspection_survives_every_reboot() -> None:
    assert pending(replay([Happened(54), *[Rebooted()] * 10])) == {54: "inspect"}
    assert pending(replay([Happened(54), Repaired()])) == {}


@pytest.mark.parametrize("code", REBOOTABLE)
def test_after_two_reboots_with_the_same_xid_the_hardware_is_inspected(code: int) -> None:
    round_: list[Event] = [Happened(code), Rebooted()]
    assert pending(replay([*round_, Happened(code)])) == {code: TABLE[code].action}
    third = [*round_, *round_, Happened(code)]
    assert pending(replay(third)) == {code: "inspect"}
    assert pending(replay([*third, Rebooted()])) == {code: "inspect"}
    assert pending(replay([*third, Repaired(), Happened(code)])) == {code: TABLE[code].action}


def test_another_xid_does_not_count_towards_it() -> None:
    past: list[Event] = [Happened(79), Rebooted(), Rebooted(), Happened(48)]
    assert pending(replay(past)) == {48: "reset"}


@given(events)
def test_state_of_the_past_stands_for_the_past(past: Sequence[Event]) -> None:
    for cut in range(len(past) + 1):
        assert replay(past[cut:], replay(past[:cut])) == replay(past)


@given(events, st.integers(1, 5))
def test_a_storm_is_the_same_as_one_event(past: Sequence[Event], times: int) -> None:
    storm = [each for event in past for each in [event] * (times if isinstance(event, Happened) else 1)]
    assert replay(storm) == replay(past)


@given(events)
def test_the_state_never_holds_more_than_the_table(past: Sequence[Event]) -> None:
    assert set(replay(past)) <= set(DRAINING)


@given(events)
def test_a_repair_forgets_everything(past: Sequence[Event]) -> None:
    assert replay([*past, Repaired()]) == {}


@given(events, st.sampled_from(DRAINING))
def test_a_draining_xid_is_pending_until_a_reboot_or_repair(past: Sequence[Event], code: int) -> None:
    quiet = [each for each in past if isinstance(each, Happened)]
    assert code in pending(replay([*past, Happened(code), *quiet]))


@given(events)
def test_a_reboot_adds_nothing_and_an_inspection_outlasts_it(past: Sequence[Event]) -> None:
    before = pending(replay(past))
    after = pending(replay([*past, Rebooted()]))
    assert after == {code: action for code, action in before.items() if action == "inspect"}


def test_labels_of_metrics_come_from_a_closed_set() -> None:
    assert [label(code) for code in (79, 4711, 0)] == ["79", OTHER, OTHER]


def test_each_code_has_its_row_and_each_finding_its_runbook() -> None:
    page = (Path(__file__).parents[3] / "docs/operate/gpu-health.md").read_text()
    sections = dict(section.split("\n", 1) for section in page.split("### ")[1:])
    for xid in TABLE.values():
        assert f"| {xid.code} | {xid.meaning} | {xid.action} |" in sections[xid.runbook]
    source = "".join(path.read_text() for path in Path(history.__file__).parent.glob("*.py"))
    named = set(re.findall(r'"((?:[a-z]+-xids)|no-\w+|missing-gpu|acceptance|settings|throttled)"', source))
    assert named <= set(sections)
    assert len(named) >= 12
