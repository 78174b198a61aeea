"""Filters of playbooks/patch.yml: what becomes of each host of a wave, by what all hosts said of themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import BACKWARD, FORWARD
from ansible_collections.llmkeep.estate.plugins.plugin_utils.waves import (
    Hostvars,
    Survey,
    last_instances,
    models_of,
    trouble,
)

TITLE = "patch"
SHOWN = 200


def patch_summary(survey: Survey) -> list[str]:
    """What a host would get, and what it would not, for people."""
    upgrades = [f"{name} {old} -> {new}" for name, (old, new) in sorted(survey["upgrades"].items())]
    lines = [f"{len(upgrades)} packages: {', '.join(upgrades[:SHOWN])}" if upgrades else "no newer package"]
    for title, names in (
        ("new besides", survey["new"]),
        ("kept back by apt", survey["kept_back"]),
        ("not rolled back, data are saved before", survey["one_way"]),
        ("on no mirror, so without updates", survey["sourceless"]),
        ("units that run replaced files", survey["stale"]),
        ("needs a reboot", survey["reboot"]),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{title}: {', '.join(names[:SHOWN])}{more}")
    if survey["step"] in (*FORWARD, *BACKWARD):
        lines.append(f"its last patch did not end: {survey['step']} {survey['cause']}".rstrip())
    return lines


def _fate(survey: Survey, back: bool) -> dict[str, str] | None:
    """What is decided by the host alone; None where its patch would begin."""
    if survey["step"] in BACKWARD:
        return {"do": "back", "why": survey["cause"]}
    # Sent into the new kernel again, it would hang there again.
    if (
        survey["step"] == "booting"
        and survey["own_kernel"]
        and survey["running"] == survey["previous"]["kernel"]
    ):
        return {"do": "back", "why": "it did not come up with the new kernel"}
    if back:
        if survey["previous"].get("packages"):
            return {"do": "back", "why": "it was asked for"}
        return {
            "do": "refuse",
            "why": "it was asked to roll back, and has nothing that it could roll back to",
        }
    if survey["step"] in FORWARD:
        return {"do": "upgrade", "why": f"it goes on after {survey['step']}"}
    if not (survey["upgrades"] or survey["stale"] or survey["reboot"]):
        return {"do": "skip", "why": "it has nothing newer to get"}
    return None


def patch_wave(
    surveys: Mapping[str, Survey],
    batch: list[str],
    hostvars: Hostvars,
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, dict[str, str]]:
    """What to do with each host of a wave, and why.

    `do`: skip, upgrade (begin, or go on), back (to the packages of before), wait (another host of the wave goes back) or refuse
    (nothing is changed; `why` says it). `options`: last_instance, reboot, back, control (hosts whose reboot would end the run).
    """
    plan: dict[str, dict[str, str]] = {}
    fresh: list[str] = []
    for host in batch:
        if "upgrades" not in surveys[host]:
            plan[host] = {"do": "refuse", "why": trouble(host, surveys[host], TITLE)}
        elif fate := _fate(surveys[host], options["back"]):
            plan[host] = fate
        else:
            fresh.append(host)
    if any(each["do"] == "back" for each in plan.values()):
        return plan | {host: {"do": "wait", "why": "another host of its wave goes back"} for host in fresh}
    refusals = [
        reason
        for host, survey in surveys.items()
        if plan.get(host, {}).get("do") != "upgrade" and (reason := trouble(host, survey, TITLE))
    ]
    if not options["last_instance"]:
        refusals += last_instances(fresh, surveys, models_of(hostvars, surveys, defaults))
    for host in fresh:
        why = refusals + [
            f"{job} runs, and newer libraries and a reboot would end it: wait for it, or stop it"
            for job in surveys[host]["jobs"]
        ]
        plan[host] = {"do": "refuse" if why else "upgrade", "why": "; ".join(why)}
    return plan


class FilterModule:
    """What Ansible calls them."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"patch_summary": patch_summary, "patch_wave": patch_wave}
