"""Filters of playbooks/upgrade-drivers.yml: what becomes of each host of a wave, by what all hosts said of themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import BACKWARD, FORWARD
from ansible_collections.llmkeep.estate.plugins.plugin_utils.waves import (
    Hostvars,
    Survey,
    canary_models,
    last_instances,
    models_of,
    trouble,
)

TITLE = "upgrade"


def driver_set(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The set of that name in a host's inventory; empty if there is none."""
    name, sets = values.get("gpu_set", defaults["gpu_set"]), values.get("gpu_sets", defaults["gpu_sets"])
    return next((each for each in sets if each["name"] == name), {})


def wears(survey: Survey, target: Mapping[str, Any]) -> bool:
    """Whether the set's driver is installed for the kernel that boots next, and runs on it."""
    name, version = target["dkms"]["name"], target["driver"]
    if [name, version, survey["kernel"]] not in [list(each) for each in survey["installed"]]:
        return False
    return not survey["own_kernel"] or (survey["running"], survey["loaded"]) == (survey["kernel"], version)


def came_up(survey: Survey, target: Mapping[str, Any]) -> bool:
    """Whether a host that was sent into a new pair of kernel and driver runs it; a container has no kernel of its own."""
    before, runs = survey.get("previous", {}), [survey["running"], survey["loaded"]]
    return not survey["own_kernel"] or (
        survey["loaded"] == target["driver"] and runs != [before.get("kernel"), before.get("version")]
    )


def driver_wave(
    surveys: Mapping[str, Survey],
    batch: list[str],
    hostvars: Hostvars,
    defaults: Mapping[str, Any],
    takes_last: bool = False,
    control: list[str] | None = None,
) -> dict[str, dict[str, str]]:
    """What to do with each host of a wave, and why.

    `do`: skip (it has the set, and is healthy), upgrade (begin, or go on), back (an upgrade failed, or the host did not come up
    with the new driver, and its rollback did not end), wait (another host of the wave goes back) or refuse (nothing is changed;
    `why` says it).
    """
    plan: dict[str, dict[str, str]] = {}
    fresh: list[str] = []
    for host in batch:
        survey = surveys[host]
        if "engines" not in survey:
            plan[host] = {"do": "refuse", "why": trouble(host, survey, TITLE)}
            continue
        target = driver_set(hostvars[host], defaults)
        if survey["step"] in BACKWARD:
            plan[host] = {"do": "back", "why": survey["cause"]}
        # Sent into the new kernel again, it would hang there again.
        elif target and survey["step"] == "booting" and not came_up(survey, target):
            plan[host] = {"do": "back", "why": "it did not come up with the new driver"}
        elif target and survey["step"] in FORWARD:
            plan[host] = {"do": "upgrade", "why": f"it goes on after {survey['step']}"}
        elif survey["step"] in FORWARD:
            plan[host] = {
                "do": "refuse",
                "why": f"{trouble(host, survey, TITLE)}, and gpu_set is not one of gpu_sets: name the set that it was brought to",
            }
        elif not target and hostvars[host].get("gpu_set") == "provided":
            plan[host] = {"do": "skip", "why": "its operator installs the driver"}
        elif not target:
            plan[host] = {"do": "refuse", "why": "gpu_set is not one of gpu_sets"}
        elif not wears(survey, target):
            fresh.append(host)
        elif complaint := "; ".join(filter(None, [trouble(host, survey, TITLE), survey["complaint"]])):
            plan[host] = {
                "do": "refuse",
                "why": f"it has the set {target['name']} and is not healthy: {complaint}",
            }
        else:
            plan[host] = {"do": "skip", "why": f"it has the set {target['name']}"}
    if any(each["do"] == "back" for each in plan.values()):
        return plan | {host: {"do": "wait", "why": "another host of its wave goes back"} for host in fresh}
    refusals = [
        trouble(host, survey, TITLE)
        for host, survey in surveys.items()
        if "gpu" in hostvars[host]["group_names"]
        and trouble(host, survey, TITLE)
        # Hosts of this wave whose upgrade goes on are drained by it.
        and plan.get(host, {}).get("do") != "upgrade"
    ]
    models = models_of(hostvars, surveys, defaults)
    if not takes_last:
        refusals += last_instances(fresh, surveys, models)
    for host in fresh:
        why = refusals + [
            f"{job} runs, and a reboot would end it: wait for it, or stop it" for job in surveys[host]["jobs"]
        ]
        if (hostvars[host].get("gpu_health_expect") or {}).get("mig_layout"):
            why.append(
                "its MIG instances may go with a reboot: declare mig_layout as {} until it is upgraded (docs/operate/gpu.md)"
            )
        if surveys[host]["own_kernel"] and host in (control or []):
            why.append(
                "it is the control node, and a reboot would end this run: use site.yml and reboot it yourself"
            )
        plan[host] = {"do": "refuse" if why else "upgrade", "why": "; ".join(why)}
    return plan


class FilterModule:
    """What Ansible calls them."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"canary_models": canary_models, "driver_set": driver_set, "driver_wave": driver_wave}
