#!/usr/bin/env python3
"""Measures the cost of a run of `site.yml` without changes: tasks by role and host, seconds, CPU and memory of the control node.

A task counts when a module ran, on the host or on the control node; skipped tasks, imports and handlers that had
nothing to do do not. CPU and memory are ansible-runner's with all that it starts, Ansible's processes and the masters of
SSH connections among them; modules on the hosts are not in it. Run it where the hosts are reached, after `make lab`:

    PATH=$PWD/.venv/bin:$PATH lab netns -- python bench/site.py --runs 3
    PATH=$PWD/.venv/bin:$PATH lab netns -- python bench/site.py --tags hsm,luks    # some roles only
    PATH=$PWD/.venv/bin:$PATH lab netns -- python bench/site.py --limit ops1,llm1  # some hosts only
"""

import argparse
import collections
import multiprocessing
import shlex
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner
from spent import Spent

ROOT = Path(__file__).resolve().parents[1]
BUDGET_TASKS = 8  # a role and host, its verification included
BUDGET_SECONDS = 30


@dataclass
class Cost:
    """Of one run."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int = 0
    remote_seconds: float = 0.0
    changed: int = 0
    failed: int = 0
    tasks: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    role_seconds: dict[tuple[str, str], float] = field(default_factory=lambda: collections.defaultdict(float))

    def hear(self, event: dict[str, Any]) -> bool:
        """Count one of ansible-runner's events; False keeps it from being written to disk."""
        data = event.get("event_data", {})
        if event.get("event") in ("runner_on_failed", "runner_on_unreachable"):
            self.failed += 1
        if event.get("event") == "runner_on_ok":
            of = data.get("role") or "(playbooks)", data["host"]
            self.tasks[of] += 1
            self.role_seconds[of] += data.get("duration") or 0.0
            self.remote_seconds += data.get("duration") or 0.0
            self.changed += bool((data.get("res") or {}).get("changed"))
        return False


def run(inventories: list[str], words: list[str]) -> Cost:
    """The cost of one run, without CPU and memory."""
    cost = Cost()
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        ansible_runner.run(
            private_data_dir=work,
            project_dir=str(ROOT),
            playbook=str(ROOT / "site.yml"),
            cmdline=shlex.join([*(word for each in inventories for word in ("-i", each)), *words]),
            envvars={"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            settings={"suppress_env_files": True},
            event_handler=cost.hear,
            quiet=True,
        )
        cost.seconds = time.monotonic() - started
    return cost


def measured(inventories: list[str], words: list[str]) -> Cost:
    """The cost of one run in a separate process."""
    spawned = multiprocessing.get_context("spawn")
    with Spent() as spent, ProcessPoolExecutor(1, spawned, Path.write_text, (spent.entry, "0")) as pool:
        cost = pool.submit(run, inventories, words).result()
        cost.cpu_seconds, cost.memory = spent.cpu(), spent.peak
    return cost


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-i", "--inventory", action="append", help="may be repeated; inventory/lab without it"
    )
    parser.add_argument("--tags", default="all", help="roles, with commas between")
    parser.add_argument("--limit", default="all", help="hosts, with commas between")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    inventories = given.inventory or [str(ROOT / "inventory/lab")]
    costs = [measured(inventories, ["--tags", given.tags, "--limit", given.limit]) for _ in range(given.runs)]
    last = costs[-1]
    if last.failed or last.changed:
        print(f"not a no-change run: {last.failed} failed, {last.changed} changed; run site.yml first")
        return 1
    print(f"{'role':<14} {'host':<8} tasks  seconds in modules")
    for (role, host), count in sorted(last.tasks.items()):
        spent = statistics.median(cost.role_seconds[role, host] for cost in costs)
        print(
            f"{role:<14} {host:<8} {count:>5} {spent:>8.1f}{'  above the budget' if count > BUDGET_TASKS else ''}"
        )
    total = sum(last.tasks.values())
    seconds = sorted(cost.seconds for cost in costs)
    remote = statistics.median(cost.remote_seconds for cost in costs)
    wall = statistics.median(seconds)
    print(f"{total} tasks; {seconds[0]:.1f} / {wall:.1f} / {seconds[-1]:.1f} s (min / median / max of {given.runs}), "
          f"budget {BUDGET_SECONDS} s")  # fmt: skip
    print(f"a task: {1000 * remote / total:.0f} ms in the module and on the way, "
          f"{1000 * max(wall - remote, 0) / total:.0f} ms on the controller")  # fmt: skip
    cpu = sorted(cost.cpu_seconds for cost in costs)
    hosts = len({host for _, host in last.tasks})
    print(f"the control node: {cpu[0]:.1f} / {statistics.median(cpu):.1f} / {cpu[-1]:.1f} s of CPU, at most "
          f"{max(cost.memory for cost in costs) / 2**20:.0f} MiB, {hosts} hosts")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
