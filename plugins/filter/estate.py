"""Filters of the playbooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SHOWN = 160  # characters; the report has it all


def locked_purls(lock: dict[str, Any]) -> list[str]:
    """Package URLs of what a bundle must carry of artifacts.lock.yml: packages, models, wheels.

    Not programs: a bundle is built without one that could not be had, and the estate does without it.
    """
    wheels = {key for name in ("control", "payload") for key in lock["environments"].get(name, [])}
    found = [lock["wheels"][key]["purl"] for key in wheels]
    found += [artifact["purl"] for kind in ("debs", "models") for artifact in lock[kind].values()]
    return sorted(found)


def failed_check(pair: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """One failed check of one host, as a line for people."""
    host, check = pair
    observed = check["observed"] if len(check["observed"]) <= SHOWN else f"{check['observed'][:SHOWN]}…"
    return f"{host['key']}: {check['id']}: expected {check['expected']}; observed {observed}"


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"locked_purls": locked_purls, "failed_check": failed_check}
