"""What a change that goes from host to host must not do, by what all hosts said of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import BACKWARD, FORWARD

Survey = Mapping[str, Any]
Hostvars = Mapping[str, Mapping[str, Any]]


def canary_models(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Models of llm_serving_models that this host computes: its engines, and vLLM behind a socket."""
    return [
        {"name": model["name"], "embeds": model.get("driver") == "embed"}
        for model in models
        if model.get("driver") != "remote" or (model.get("remote") or {}).get("socket")
    ]


def models_of(
    hostvars: Hostvars, hosts: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, list[str]]:
    """The models that hosts with engines compute."""
    return {
        host: [
            model["name"]
            for model in canary_models(
                hostvars[host].get("llm_serving_models", defaults["llm_serving_models"])
            )
        ]
        for host in hosts
        if {"serve", "engines"} & set(hostvars[host]["group_names"])
    }


def trouble(host: str, survey: Survey, title: str) -> str:
    """The reason why this host's state prevents other hosts' changes, called `title`; empty if there is none."""
    if survey.get("unreachable"):
        return f"{host} does not answer"
    if "engines" not in survey:
        return f"{host} cannot say how it is: {survey.get('msg')}"
    held = [
        f"{name} of {host} is quarantined by {held['by']}: {held['reason']}"
        for name, held in survey["engines"].items()
        if held
    ]
    if survey["step"] in (*FORWARD, *BACKWARD):
        held.append(f"the {title} of {host} did not end, its last step was {survey['step']}")
    return "; ".join(held)


def last_instances(
    starting: list[str], surveys: Mapping[str, Survey], models: Mapping[str, list[str]]
) -> list[str]:
    """Sentences for models that no host outside the wave serves while these hosts are drained."""
    sentences = []
    for name in sorted({model for host in starting for model in models.get(host, [])}):
        of = [host for host in starting if name in models.get(host, [])]
        others = [host for host in models if name in models[host] and host not in starting]
        if any(surveys[host].get("ready") for host in others):
            continue
        reason = f"{', '.join(others)} is not ready" if others else "no other host has it"
        sentences.append(f"it would take away the last instance of {name}, on {', '.join(of)} ({reason})")
    return sentences
