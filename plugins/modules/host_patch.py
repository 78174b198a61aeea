#!/usr/bin/python
"""State module: one host's part in a rollout of newer Debian packages."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_patch
short_description: Take the steps of a patch on one host, or roll it back
description:
  - C(surveyed) reads what apt would upgrade by the lists that it has, which units run replaced files, why a reboot is needed,
    and how far a patch got. It changes nothing.
  - C(begun) saves the versions that are to be replaced, with copies of their packages, before anything changes. A patch that
    was interrupted keeps what was saved when it began.
  - C(drained) and C(undrained) give the orders to C(llm-gpu), as the operator C(patch), where the host has it.
  - C(installed) upgrades all packages, and keeps configuration files.
  - C(restarted) restarts the units that run replaced files, gateways last and one after the other.
  - C(booting) has the newest kernel boot once; C(booted) makes the kernel that runs the default.
  - C(noted) saves I(step).
  - C(restored) brings back the packages and GRUB's default of before.
  - Each step is put on the host's audit record, where it has one, and into its journal. Only a rollback goes on without the
    record.
author: [llmkeep contributors (@llmkeep)]
options:
  state:
    description: What to do.
    type: str
    required: true
    choices: [surveyed, begun, drained, undrained, installed, restarted, booting, booted, noted, restored]
  step: {description: The step that is noted., type: str, choices: [answered, done, failed, returned, stuck]}
  cause: {description: Why it failed; noted with the step., type: str, default: ""}
  new_packages:
    description: Whether packages that newer versions need besides are installed, such as the next kernel.
    type: bool
    default: true
  packages: {description: "Whether a survey asks apt, too.", type: bool, default: true}
  serials:
    description: Of the mirror's bundles. The host is brought to the last one; packages of before are looked for in all.
    type: list
    elements: int
    default: []
  without_rollback: {description: Go on where packages of before cannot be had., type: bool, default: false}
  one_way:
    description: >-
      Packages whose data no older version reads, each with the unit that saves the data. It is started before such a package
      is upgraded, and a rollback keeps the package.
    type: dict
    default: {}
  seconds: {description: Longest time to wait., type: int, default: 60}
  models:
    description: Engines of the host, whose state is part of C(surveyed); as in M(llmkeep.estate.serving_canary).
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: Name of the model., type: str, required: true}
      embeds: {description: Whether it answers with embeddings., type: bool, default: false}
      socket: {description: UNIX socket of its engine., type: path}
      http: {description: Whether a server of OpenAI's API listens there., type: bool, default: false}
      credential: {description: Sealed credential of this host with that server's key., type: str, default: ""}
  recorded: {description: Whether the host has an audit record., type: bool, default: false}
  root: {description: Where the host's files lie; a test names a folder., type: path, default: /}
"""

EXAMPLES = r"""
- name: See what is newer
  llmkeep.estate.host_patch:
    state: surveyed
"""

RETURN = r"""
step: {description: How far the patch got., returned: always, type: str}
cause: {description: Why it failed., returned: always, type: str}
previous: {description: What the host had before., returned: always, type: dict}
upgrades: {description: Package to its version now and then., returned: when surveyed, type: dict}
new: {description: Packages that come besides., returned: when surveyed, type: list}
kept_back: {description: Packages that apt does not upgrade., returned: when surveyed, type: list}
sourceless: {description: Packages that the mirror does not have., returned: when surveyed, type: list}
stale: {description: Units that run replaced files., returned: when surveyed, type: list}
reboot: {description: Why the host has to reboot., returned: when surveyed, type: list}
own_kernel: {description: Whether the host boots a kernel of its own., returned: when surveyed, type: bool}
running: {description: The kernel that runs., returned: when surveyed, type: str}
engines: {description: "Engines with by, since and reason of their quarantine.", returned: when surveyed, type: dict}
ready: {description: "Whether engines of the host are ready and a gateway, if it has some.", returned: when surveyed, type: bool}
jobs: {description: Units of training jobs that run., returned: when surveyed, type: list}
restarted: {description: Units that were restarted., returned: when restarted, type: list}
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import debs, rollout
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import canary, kernels
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import upgrade as watch
from ansible_collections.llmkeep.estate.plugins.module_utils.patch import services, upgrades

KIND = rollout.Kind("patch", "host.patch", "patch", lambda progress: {"llmkeep.bundle": progress.wanted})
JOBS = (
    "systemctl",
    "list-units",
    "--plain",
    "--no-legend",
    "--state=active,activating",
    "llm-train@*.service",
)


@dataclass(frozen=True)
class Host:
    """Where things lie on the host, and what it runs."""

    root: Path

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    @property
    def progress(self) -> Path:
        return self / "var/lib/llmkeep/patch/progress.json"

    @property
    def archive(self) -> Path:
        return self / "var/lib/llmkeep/patch/previous"

    @property
    def program(self) -> Path:
        return self / "usr/local/bin/llm-gpu"

    def kernel(self) -> tuple[str, str, bool]:
        """The one that runs, the newest one that is installed, and whether the host boots its own."""
        running, boot = os.uname().release, self / "boot"
        if not kernels.boots_itself(boot, running):
            return running, running, False
        there = [path.name.removeprefix("vmlinuz-") for path in boot.glob("vmlinuz-*")]
        newest = upgrades.run(["sh", "-c", 'printf "%s\\n" "$@" | sort -V', "sort", *there]).splitlines()[-1]
        return running, newest, True

    def ready(self, instance: str) -> bool:
        """Whether one of its gateways is."""
        status: int = canary.ask(self / f"run/llm-gateway/{instance}.sock", "GET", "/readyz")[0]
        return status == 200


def surveyed(parameters: dict[str, Any], host: Host) -> dict[str, Any]:
    """What the decision needs of a host. Raises rollout.Failed."""
    plan = vars(upgrades.plan(parameters["new_packages"], upgrades.run)) if parameters["packages"] else {}
    running, newest, own = host.kernel()
    stale = services.stale(host / "proc")
    reboot = [f"{unit} runs replaced files" for unit in services.by_reboot(stale) if own]
    if newest != running:
        reboot.append(f"the kernel {newest} is installed, and {running} runs")
    return {
        "changed": False,
        **plan,
        "one_way": sorted(set(plan.get("upgrades", {})) & set(parameters["one_way"])),
        "stale": services.to_restart(stale),
        "reboot": reboot,
        "own_kernel": own,
        "running": running,
        "engines": watch.engines(host.program),
        "ready": canary.is_ready(host / "run/llm-gateway", canary.engines(parameters["models"], host.root)),
        "jobs": [line.split()[0] for line in upgrades.run([*JOBS]).splitlines()],
    }


def begin(parameters: dict[str, Any], progress: rollout.Progress, host: Host) -> None:
    """Save what is to be replaced, unless a patch that did not end has saved it. Raises rollout.Failed, OSError."""
    progress.wanted, progress.cause = f"bundle {max(parameters['serials'], default='')}", ""
    if progress.step in rollout.FORWARD:
        return
    plan = upgrades.plan(parameters["new_packages"], upgrades.run)
    if progress.previous and not plan.upgrades:
        # Restarts alone: what a rollback brings stays that of the last upgrade, but for the kernel.
        progress.previous = {**progress.previous, "kernel": host.kernel()[0]}
        return
    there = debs.versions(upgrades.run)
    previous = upgrades.Previous({name: there[name] for name in plan.upgrades}, plan.new, host.kernel()[0])
    aside = host.archive.with_name("next")
    shutil.rmtree(aside, ignore_errors=True)
    older = upgrades.repositories(host / "etc/apt/sources.list.d/llmkeep.sources", parameters["serials"])
    one_way = set(previous.packages) & set(parameters["one_way"])
    for name in one_way:
        del previous.packages[name]  # a rollback keeps it
    lacking = upgrades.keep(previous, aside, host / "var/cache/apt/archives", older, upgrades.run)
    if lacking and not parameters["without_rollback"]:
        raise rollout.Failed(
            f"there is no rollback for {len(lacking)} of {len(previous.packages)} packages, which neither apt's archives nor"
            f" the mirror's bundles have: {', '.join(lacking)}. Nothing was changed. To continue without a rollback, use "
            "--without-rollback"
        )
    for unit in sorted({parameters["one_way"][name] for name in one_way}):
        upgrades.run(["systemctl", "start", unit])
    for name in lacking:
        del previous.packages[name.split()[0]]
    shutil.rmtree(host.archive, ignore_errors=True)
    aside.rename(host.archive)
    progress.previous = previous.saved()


def restored(progress: rollout.Progress, host: Host) -> bool:
    """Bring back packages and kernel; whether that took a change. Raises rollout.Failed."""
    previous = upgrades.Previous(**progress.previous)
    changed: bool = debs.restore(previous.packages, previous.added, host.archive, upgrades.run)
    chosen: bool = kernels.make_default(previous.kernel, host.kernel()[0], host / "boot", kernels.run)
    return changed or chosen


def settle(module: AnsibleModule, host: Host) -> dict[str, Any]:
    """Do what the state says; what the module returns. Raises rollout.Failed, OSError."""
    parameters, state = module.params, module.params["state"]
    if state == "surveyed":
        return surveyed(parameters, host)
    progress = rollout.load(host.progress)
    step, changed, more = state, True, {}
    if state == "begun":
        begin(parameters, progress, host)
    elif state in ("drained", "undrained"):
        reason = f"patch to {progress.wanted}"
        changed = watch.order(
            host.program, state.removesuffix("ed"), reason, parameters["seconds"], KIND.operator
        )
    elif state == "installed":
        upgrades.run(["dpkg", "--force-confold", "--configure", "-a"])  # where it was interrupted
        upgrades.run(upgrades.upgrade(parameters["new_packages"]))
    elif state == "restarted":
        units = services.stale(host / "proc")
        more["restarted"] = services.restart(units, host.ready, parameters["seconds"], upgrades.run)
        changed = bool(more["restarted"])
    elif state in ("booting", "booted"):
        running, newest, _ = host.kernel()
        chosen = newest if state == "booting" else running
        changed = kernels.choose(chosen, running, accepted=state == "booted", boot=host / "boot")
    elif state == "noted":
        step, progress.cause = parameters["step"], parameters["cause"]
    else:
        changed = restored(progress, host)
    if state not in ("restored", "undrained", "restarted", "booted") and (
        state == "noted" or progress.step not in rollout.BACKWARD
    ):
        audit = host / "run/llm-audit/audit.sock" if parameters["recorded"] else None
        rollout.note(host.progress, audit, KIND, step, progress, module.log)
    return {"changed": changed, **more}


def main() -> None:
    states = [
        "surveyed",
        "begun",
        "drained",
        "undrained",
        "installed",
        "restarted",
        "booting",
        "booted",
        "noted",
        "restored",
    ]
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "required": True, "choices": states},
            "step": {"type": "str", "choices": ["answered", "done", "failed", "returned", "stuck"]},
            "cause": {"type": "str", "default": ""},
            "new_packages": {"type": "bool", "default": True},
            "packages": {"type": "bool", "default": True},
            "serials": {"type": "list", "elements": "int", "default": []},
            "without_rollback": {"type": "bool", "default": False},
            "one_way": {"type": "dict", "default": {}},
            "seconds": {"type": "int", "default": 60},
            "recorded": {"type": "bool", "default": False},
            "models": {"type": "list", "elements": "dict", "default": [], "options": canary.MODEL},
            "root": {"type": "path", "default": "/"},
        },
        required_if=[("state", "noted", ["step"])],
    )
    host = Host(Path(module.params["root"]))
    try:
        result = settle(module, host)
        progress = rollout.load(host.progress)
        result |= {"step": progress.step, "cause": progress.cause, "previous": progress.previous}
    except (rollout.Failed, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
