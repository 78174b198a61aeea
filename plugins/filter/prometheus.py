"""Filters of role prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.llmkeep.estate.plugins.plugin_utils import objectives


def prometheus_rules(
    slo: Mapping[str, Any], alerts: list[dict[str, Any]], jobs: list[str], runbooks: str
) -> dict[str, Any]:
    """Content of a rules file, from slo.yml, alerts.yml, the jobs of this estate, and the address of the runbooks' page."""
    try:
        made: dict[str, Any] = objectives.prometheus_rules(slo, alerts, jobs, runbooks)
    except objectives.ObjectiveError as error:
        raise AnsibleFilterError(
            f"{error}. docs/operate/metrics.md describes objectives and alerts."
        ) from None
    return made


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"prometheus_rules": prometheus_rules}
