"""What becomes of each host of a wave of patches, by what all hosts say of themselves."""

from typing import Any

import pytest
from plugin_modules import load

filters = load("filter.host_patch")

DEFAULTS = {"llm_serving_models": [{"name": "m", "driver": "echo"}]}
SICK = {"by": "llm-gpu", "since": "now", "reason": "GPU 3: lost"}


def survey(**more: Any) -> dict[str, Any]:
    """A host that serves well and has one older package."""
    return {
        "engines": {"e": {}},
        "step": "",
        "cause": "",
        "previous": {},
        "ready": True,
        "own_kernel": True,
        "running": "6.12.1",
        "upgrades": {"openssl": ["1", "2"]},
        "new": [],
        "kept_back": [],
        "one_way": [],
        "sourceless": [],
        "stale": [],
        "reboot": [],
        "jobs": [],
    } | more


def plan(batch: list[str], **options: Any) -> dict[str, tuple[str, str]]:
    """By host: what to do, and why. OPTIONS: surveys of the hosts that differ, and options of the filter."""
    hosts = ("a", "b", "c")
    surveys = {host: options.pop(host, survey()) for host in hosts}
    hostvars = {host: {"group_names": ["serve"]} for host in hosts}
    chosen = {"last_instance": False, "back": False} | options
    found = filters.patch_wave(surveys, batch, hostvars, DEFAULTS, chosen)
    return {host: (each["do"], each["why"]) for host, each in found.items()}


def test_a_host_with_an_older_package_is_patched() -> None:
    assert plan(["a"]) == {"a": ("upgrade", "")}


@pytest.mark.parametrize(
    "left", [{"stale": ["redis-server.service"]}, {"reboot": ["the kernel 2 is installed, and 1 runs"]}]
)
def test_a_host_that_runs_what_was_replaced_before_is_patched(left: dict[str, Any]) -> None:
    assert plan(["a"], a=survey(upgrades={}, **left)) == {"a": ("upgrade", "")}


def test_a_host_with_nothing_newer_is_left() -> None:
    assert plan(["a"], a=survey(upgrades={})) == {"a": ("skip", "it has nothing newer to get")}


def test_a_host_goes_on_where_it_was_interrupted() -> None:
    assert plan(["a"], a=survey(step="installed")) == {"a": ("upgrade", "it goes on after installed")}


@pytest.mark.parametrize("step", ["failed", "stuck"])
def test_a_failed_patch_is_taken_back_first_and_the_others_of_its_wave_wait(step: str) -> None:
    said = plan(["a", "b"], a=survey(step=step, cause="no answer"))
    assert said == {"a": ("back", "no answer"), "b": ("wait", "another host of its wave goes back")}


def test_a_host_that_came_up_with_the_kernel_of_before_is_not_sent_into_the_new_one_again() -> None:
    booting = survey(step="booting", previous={"kernel": "6.12.1"})
    assert plan(["a"], a=booting) == {"a": ("back", "it did not come up with the new kernel")}
    assert plan(["a"], a=booting | {"running": "6.12.2"}) == {"a": ("upgrade", "it goes on after booting")}


@pytest.mark.parametrize(
    ("differs", "why"),
    [
        ({"unreachable": True}, "b does not answer"),
        ({"step": "installed"}, "the patch of b did not end, its last step was installed"),
        ({"engines": {"e": SICK}}, "e of b is quarantined by llm-gpu: GPU 3: lost"),
    ],
)
def test_no_host_is_patched_while_another_one_is_not_well(differs: dict[str, Any], why: str) -> None:
    assert plan(["a"], b=survey(**differs)) == {"a": ("refuse", why)}


def test_the_last_instance_of_a_model_stays_unless_that_is_asked_for() -> None:
    away = survey(ready=False)
    assert plan(["a"], b=away, c=away)["a"][1].startswith("it would take away the last instance of m, on a")
    assert plan(["a"], b=away, c=away, last_instance=True) == {"a": ("upgrade", "")}


def test_a_running_job_is_waited_for() -> None:
    said = plan(["a"], a=survey(jobs=["llm-train@job.service"]))
    assert said["a"] == (
        "refuse",
        "llm-train@job.service runs, and newer libraries and a reboot would end it: wait for it, or stop it",
    )


def test_a_host_goes_back_where_that_is_asked_for_and_it_has_something_to_go_back_to() -> None:
    done = survey(step="done", previous={"packages": {"openssl": "1"}, "kernel": "6.12.1"})
    assert plan(["a"], a=done, back=True) == {"a": ("back", "it was asked for")}
    assert plan(["a"], back=True)["a"][0] == "refuse"


def test_the_summary_says_what_a_host_gets_and_what_it_does_not() -> None:
    said = filters.patch_summary(
        survey(sourceless=["vim"], reboot=["dbus.service runs replaced files"], step="stuck", cause="x")
    )
    assert said == [
        "1 packages: openssl 1 -> 2",
        "on no mirror, so without updates: vim",
        "needs a reboot: dbus.service runs replaced files",
        "its last patch did not end: stuck x",
    ]
