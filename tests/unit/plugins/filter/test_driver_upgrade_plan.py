"""What becomes of each host of a wave, by what all hosts say of themselves."""

from typing import Any

import pytest
from plugin_modules import load

filters = load("filter.driver_upgrade")

OLD, NEW = "1.0", "2.0"
KERNEL = "6.12.118"
WANTED = {"name": "new", "driver": NEW, "dkms": {"name": "nvidia"}}
DEFAULTS = {"gpu_set": "new", "gpu_sets": [WANTED], "llm_serving_models": [{"name": "m", "driver": "echo"}]}
SICK = {"by": "llm-gpu", "since": "now", "reason": "GPU 3: lost"}
OURS = {"by": "upgrade-drivers", "since": "now", "reason": "driver upgrade"}


def survey(version: str = OLD, **more: Any) -> dict[str, Any]:
    """A host that serves well with a driver."""
    return {
        "engines": {"e": {}},
        "step": "",
        "cause": "",
        "ready": True,
        "kernel": KERNEL,
        "running": KERNEL,
        "loaded": version,
        "own_kernel": True,
        "installed": [["nvidia", version, KERNEL]],
        "complaint": "",
        "jobs": [],
    } | more


def plan(batch: list[str], **options: Any) -> dict[str, tuple[str, str]]:
    """By host: what to do, and why. OPTIONS: surveys of the hosts that differ, and options of the filter."""
    hosts = ("a", "b", "c", "d")
    surveys = {host: options.pop(host, survey()) for host in hosts}
    models = options.pop("models", {})
    own = options.pop("gpu_set", {})
    expect = options.pop("expect", {})
    hostvars = {
        host: {
            **({"gpu_set": own[host]} if host in own else {}),
            **({"gpu_health_expect": expect[host]} if host in expect else {}),
            "group_names": ["gpu", "serve"],
            **({"llm_serving_models": models[host]} if host in models else {}),
        }
        for host in hosts
    }
    found = filters.driver_wave(surveys, batch, hostvars, DEFAULTS, **options)
    return {host: (each["do"], each["why"]) for host, each in found.items()}


def test_hosts_that_are_well_and_have_another_set_are_upgraded() -> None:
    assert plan(["a", "b"]) == {"a": ("upgrade", ""), "b": ("upgrade", "")}


@pytest.mark.parametrize(
    "differs",
    [{"running": "6.12.100"}, {"loaded": OLD}, {"installed": [["nvidia", NEW, "6.12.100"]]}],
    ids=["another kernel runs", "another driver is loaded", "it is installed for another kernel"],
)
def test_a_host_has_the_set_only_once_it_runs_on_the_kernel_that_boots_next(differs: dict[str, Any]) -> None:
    assert plan(["a"], a=survey(NEW))["a"] == ("skip", "it has the set new")
    assert plan(["a"], a=survey(NEW, **differs))["a"][0] == "upgrade"


def test_a_host_that_has_the_set_and_is_sick_is_no_success() -> None:
    do, why = plan(["a"], a=survey(NEW, complaint="GPU 3: lost"))["a"]
    assert (do, why) == ("refuse", "it has the set new and is not healthy: GPU 3: lost")


def test_two_sick_hosts_at_once_are_both_named_and_no_upgrade_begins() -> None:
    do, why = plan(["a"], c=survey(engines={"e": SICK}), d=survey(engines={"e": SICK}))["a"]
    assert do == "refuse"
    for host in ("c", "d"):
        assert f"e of {host} is quarantined by llm-gpu: GPU 3: lost" in why


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"unreachable": True, "msg": "no route"}, "b does not answer"),
        ({"msg": "state.json cannot be used"}, "b cannot say how it is: state.json cannot be used"),
        (survey(step="installed"), "the upgrade of b did not end, its last step was installed"),
        (survey(step="stuck", engines={"e": OURS}), "its last step was stuck"),
    ],
)
def test_no_upgrade_begins_while_another_host_is_in_an_unknown_state(
    other: dict[str, Any], told: str
) -> None:
    do, why = plan(["a"], b=other)["a"]
    assert do == "refuse"
    assert told in why


def test_a_host_that_was_interrupted_goes_on_and_stops_no_other_host_of_its_wave() -> None:
    found = plan(["a", "b"], b=survey(NEW, step="accepted", engines={"e": OURS}, ready=False))
    assert found == {"a": ("upgrade", ""), "b": ("upgrade", "it goes on after accepted")}


FELL_BACK = {"step": "booting", "previous": {"kernel": "6.12.100", "version": OLD}, "engines": {"e": OURS}}


@pytest.mark.parametrize("runs", [("6.12.100", ""), ("6.12.100", OLD), (KERNEL, "")])
def test_a_host_that_did_not_come_up_with_the_new_driver_is_not_sent_there_again(
    runs: tuple[str, str],
) -> None:
    found = plan(["a"], a=survey(NEW, **FELL_BACK) | {"running": runs[0], "loaded": runs[1]})
    assert found["a"] == ("back", "it did not come up with the new driver")


def test_a_new_kernel_with_the_same_driver_is_told_from_the_former_one() -> None:
    same = FELL_BACK | {"previous": {"kernel": "6.12.100", "version": NEW}}
    assert plan(["a"], a=survey(NEW, **same))["a"] == ("upgrade", "it goes on after booting")
    assert plan(["a"], a=survey(NEW, **same) | {"running": "6.12.100"})["a"][0] == "back"


@pytest.mark.parametrize(
    "differs", [{}, {"own_kernel": False, "loaded": ""}], ids=["a machine", "a container"]
)
def test_a_host_that_came_up_before_the_run_ended_goes_on(differs: dict[str, Any]) -> None:
    found = plan(["a"], a=survey(NEW, **FELL_BACK) | differs)
    assert found["a"] == ("upgrade", "it goes on after booting")


def test_an_upgrade_does_not_go_on_to_a_set_that_does_not_exist() -> None:
    for name in ("misspelt", "provided"):
        do, why = plan(["a"], a=survey(step="installed"), gpu_set={"a": name})["a"]
        assert (do, "its last step was installed, and gpu_set is not one of gpu_sets" in why) == (
            "refuse",
            True,
        )


def test_a_host_with_mig_instances_that_a_reboot_may_take_is_refused() -> None:
    do, why = plan(["a"], expect={"a": {"mig_layout": {0: ["7g.80gb"]}}})["a"]
    assert (do, "its MIG instances may go with a reboot: " in why) == ("refuse", True)
    assert plan(["a"], expect={"a": {"mig_layout": {}}})["a"] == ("upgrade", "")


def test_a_host_that_failed_goes_back_first_and_the_others_of_its_wave_wait() -> None:
    found = plan(["a", "b"], b=survey(NEW, step="stuck", cause="no answer", engines={"e": OURS}))
    assert found["b"] == ("back", "no answer")
    assert found["a"][0] == "wait"


def test_the_last_hosts_of_a_model_are_not_drained_together_unless_that_is_asked_for() -> None:
    only = [{"name": "only", "driver": "naive"}]
    models = {"a": only, "b": only}
    assert plan(["a"], models=models)["a"] == ("upgrade", "")
    do, why = plan(["a", "b"], models=models)["a"]
    assert (do, "the last instance of only, on a, b (no other host has it)" in why) == ("refuse", True)
    do, why = plan(["a"], models=models, b=survey(ready=False))["a"]
    assert (do, "the last instance of only, on a (b is not ready)" in why) == ("refuse", True)
    assert plan(["a", "b"], models=models, takes_last=True)["a"] == ("upgrade", "")


def test_a_gateway_that_passes_questions_on_to_another_host_does_not_serve_the_model() -> None:
    passes_on = [{"name": "m", "driver": "remote", "remote": {"url": ["https://a.estate.internal:8443"]}}]
    do, why = plan(["a"], models=dict.fromkeys("bcd", passes_on))["a"]
    assert (do, "the last instance of m, on a" in why) == ("refuse", True)


def test_the_control_node_is_not_rebooted_by_its_own_run() -> None:
    do, why = plan(["a"], control=["a"])["a"]
    assert (do, "a reboot would end this run" in why) == ("refuse", True)


def test_a_host_that_trains_is_not_upgraded_under_its_job() -> None:
    do, why = plan(["a"], a=survey(jobs=["llm-train@sql.service"]))["a"]
    assert (do, "llm-train@sql.service runs" in why) == ("refuse", True)


def test_a_driver_that_its_operator_brings_is_left_alone_and_an_unknown_set_is_refused() -> None:
    assert plan(["a"], gpu_set={"a": "provided"})["a"][0] == "skip"
    assert plan(["a"], gpu_set={"a": "misspelt"})["a"] == ("refuse", "gpu_set is not one of gpu_sets")


def test_models_that_are_asked_are_those_that_the_host_computes() -> None:
    models = [
        {"name": "chat", "driver": "naive"},
        {"name": "texts", "driver": "embed"},
        {"name": "vllm", "driver": "remote", "remote": {"socket": ["/run/vllm/v/api.sock"]}},
        {"name": "elsewhere", "driver": "remote", "remote": {"url": ["https://x"]}},
    ]
    assert filters.canary_models(models) == [
        {"name": "chat", "embeds": False},
        {"name": "texts", "embeds": True},
        {"name": "vllm", "embeds": False},
    ]
