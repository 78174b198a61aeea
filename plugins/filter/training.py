"""Filters of the role llm_training: a job of the inventory as llm-train reads it, and why one cannot run."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
OURS = {"name", "model", "prepare", "memory"}  # the rest is llm-train's, which refuses what it does not know


def training_job(job: dict[str, Any], folder: str, nodes: int) -> dict[str, Any]:
    """The job file of a job: FOLDER is llm_training_dir, NODES how many hosts train together."""
    model = job["model"] if job["model"].startswith("/") else f"{folder}/models/{job['model']}"
    theirs = {key: value for key, value in job.items() if key not in OURS and value is not None}
    return theirs | {
        "name": job["name"],
        "model": model,
        "manifest": f"{model}/SHA256SUMS",
        "output": f"{folder}/jobs/{job['name']}",
        "scale": {**job.get("scale", {}), "nodes": nodes},
    }


def job_faults(jobs: list[dict[str, Any]], models: list[str], host: str, hosts: list[str]) -> list[str]:
    """One sentence for each thing that is wrong with the jobs of HOST, which HOSTS run together."""
    faults = []
    if host not in hosts:
        faults.append(
            f"{host} is not in llm_training_hosts, which is {hosts}: put it into [train], or name the hosts"
        )
    for name, count in Counter(job["name"] for job in jobs).items():
        if count > 1:
            faults.append(f"{name} is the name of {count} jobs: each has a directory and a unit of its own")
        if not NAME.fullmatch(name):
            faults.append(f"{name!r} is not a valid job name: use a-z, 0-9 and -, at most 63")
    faults += [
        f"{job['name']} trains {job['model']}, which is neither in llm_training_models nor in llm_training_releases: "
        f"add it to one, or name one of {models}"
        for job in jobs
        if not job["model"].startswith("/") and job["model"] not in models
    ]
    faults += [
        f"{job['name']} says scale.nodes {job['scale']['nodes']}, and {len(hosts)} hosts train: remove it"
        for job in jobs
        if job.get("scale", {}).get("nodes", len(hosts)) != len(hosts)
    ]
    return faults


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Any]:
        """By name."""
        return {"training_job": training_job, "job_faults": job_faults}
