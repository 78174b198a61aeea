#!/usr/bin/python
"""State module: one host's part in a rolling upgrade of its driver."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_upgrade
short_description: Take the steps of a driver upgrade on one host, and the rollback
description:
  - C(surveyed) reads what runs, which engines are quarantined, and how far an upgrade got. It changes nothing.
  - C(begun) saves what runs now, with copies of its packages and modules, before anything changes. An upgrade that was
    interrupted keeps what ran before it began.
  - C(drained) and C(undrained) give the orders to C(llm-gpu), as the operator C(upgrade-drivers), and wait until it did them.
  - C(accepted) waits until C(llm-gpu check) passes with the driver I(version).
  - C(noted) saves I(step).
  - C(restored) brings back packages, modules, holds and GRUB's default of the set that ran before.
  - Each step is put on the host's audit record, where it has one, and into its journal. Only the rollback goes on without the
    record.
author: [llmkeep contributors (@llmkeep)]
options:
  state:
    description: What to do.
    type: str
    required: true
    choices: [surveyed, begun, drained, accepted, undrained, noted, restored]
  step:
    description: The step that is noted.
    type: str
    choices: [installed, booting, answered, done, failed, returned, stuck]
  cause: {description: Why it failed; noted with the step., type: str, default: ""}
  wanted: {description: "Set, driver and version that it is to be brought to, for people.", type: str, default: ""}
  sets: {description: The estate's driver sets., type: list, elements: dict, default: []}
  flavour:
    description: "Flavour of Debian's kernel, as in C(linux-headers-FLAVOUR); empty for a host without a GPU."
    type: str
    default: ""
  version: {description: "Version of the driver to accept; by default that of the set before.", type: str, default: ""}
  cuda: {description: Whether acceptance uses each GPU through CUDA., type: bool, default: true}
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
- name: Drain the engines of this host
  llmkeep.estate.driver_upgrade:
    state: drained
    recorded: true
"""

RETURN = r"""
step: {description: How far the upgrade got., returned: always, type: str}
cause: {description: Why it failed., returned: always, type: str}
previous: {description: The set that ran before., returned: always, type: dict}
running: {description: The kernel that runs., returned: always, type: str}
loaded: {description: Version of the driver that the kernel has loaded., returned: always, type: str}
own_kernel: {description: Whether the host boots a kernel of its own., returned: always, type: bool}
engines: {description: "Engines with by, since and reason of their quarantine.", returned: when surveyed, type: dict}
kernel: {description: The kernel that boots next., returned: when surveyed, type: str}
installed: {description: "Name, version and kernel of each installed driver.", returned: when surveyed, type: list}
ready: {description: "Whether engines of the host are ready and a gateway, if it has some.", returned: when surveyed, type: bool}
complaint: {description: Why the GPUs are not accepted., returned: when surveyed, type: str}
jobs: {description: Units of training jobs that run., returned: when surveyed, type: list}
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import rollout
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import (
    canary,
    dkms,
    kernels,
    previous,
    upgrade,
)


@dataclass(frozen=True)
class Host:
    """Where things lie on the host, and what it runs."""

    root: Path

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    @property
    def program(self) -> Path:
        return self / "usr/local/bin/llm-gpu"

    @property
    def progress(self) -> Path:
        folder: Path = self.places.builds
        return folder / "upgrade.json"

    @property
    def places(self) -> dkms.Places:
        of = dkms.Places()
        return dkms.Places(*(self / str(path)[1:] for path in (of.modules, of.sources, of.tree, of.builds)))

    def facts(self) -> dict[str, Any]:
        """The kernel that runs, whether it is the host's own, and the driver that it has loaded, if any."""
        running = previous.running_kernel()
        loaded = self / "sys/module/nvidia/version"
        return {
            "running": running,
            "own_kernel": kernels.boots_itself(self / "boot", running),
            "loaded": loaded.read_text().strip() if loaded.exists() else "",
        }


def surveyed(parameters: dict[str, Any], host: Host) -> dict[str, Any]:
    """What the decision needs of a host. Raises rollout.Failed, dkms.Failed."""
    state = {
        "engines": upgrade.engines(host.program),
        "ready": canary.is_ready(host / "run/llm-gateway", canary.engines(parameters["models"], host.root)),
        "kernel": "",
        "installed": [],
        "complaint": "",
        "jobs": [],
    }
    if parameters["flavour"]:
        # A host that has no driver yet stops no other one.
        there = shutil.which("dkms") is not None
        output = previous.run(["dkms", "status", *host.places.options()]) if there else ""
        units = [
            "systemctl",
            "list-units",
            "--plain",
            "--no-legend",
            "--state=active,activating",
            "llm-train@*.service",
        ]
        state |= {
            "jobs": [line.split()[0] for line in previous.run(units).splitlines()],
            "kernel": dkms.next_kernel(parameters["flavour"]),
            "installed": previous.installed_drivers(output),
            "complaint": upgrade.complaints(host.program, "", None, parameters["cuda"]),
        }
    return {"changed": False, **state}


def begin(parameters: dict[str, Any], progress: rollout.Progress, facts: dict[str, Any], host: Host) -> None:
    """Save what runs, unless an upgrade that did not end has saved it. Raises dkms.Failed, OSError."""
    progress.wanted, progress.cause = parameters["wanted"], ""
    if progress.step in rollout.FORWARD:
        return
    places = host.places
    kernel = facts["running"] if facts["own_kernel"] else (places.builds / "kernel").read_text().strip()
    before = previous.current(kernel, parameters["sets"], places, previous.run)
    previous.keep(before, places, previous.run, host / "var/cache/apt/archives")
    progress.previous = previous.as_saved(before)


def settle(module: AnsibleModule, facts: dict[str, Any], host: Host) -> dict[str, Any]:
    """Do what the state says; what the module returns. Raises rollout.Failed, dkms.Failed, kernels.Failed, OSError."""
    parameters, state = module.params, module.params["state"]
    if state == "surveyed":
        return surveyed(parameters, host)
    progress = rollout.load(host.progress)
    step, changed = state, True
    if state == "begun":
        begin(parameters, progress, facts, host)
    elif state == "noted":
        step, progress.cause = parameters["step"], parameters["cause"]
    elif state in ("drained", "undrained"):
        reason = f"driver upgrade to {progress.wanted}"
        changed = upgrade.order(host.program, state.removesuffix("ed"), reason, parameters["seconds"])
    elif state == "accepted":
        version = parameters["version"] or progress.previous["version"]
        loaded = facts["loaded"] if facts["own_kernel"] else None
        upgrade.accept(host.program, version, loaded, parameters["cuda"], parameters["seconds"])
    else:
        before = previous.Previous(**progress.previous)
        changed = previous.restore(before, facts["running"], host.places, previous.run, host / "boot")
    # The rollback's acceptance does not count as progress.
    if state not in ("restored", "undrained") and (state == "noted" or progress.step not in rollout.BACKWARD):
        audit = host / "run/llm-audit/audit.sock" if parameters["recorded"] else None
        rollout.note(host.progress, audit, upgrade.KIND, step, progress, module.log)
    return {"changed": changed, "step": progress.step, "cause": progress.cause, "previous": progress.previous}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["surveyed", "begun", "drained", "accepted", "undrained", "noted", "restored"],
            },
            "step": {
                "type": "str",
                "choices": ["installed", "booting", "answered", "done", "failed", "returned", "stuck"],
            },
            "cause": {"type": "str", "default": ""},
            "wanted": {"type": "str", "default": ""},
            "sets": {"type": "list", "elements": "dict", "default": []},
            "flavour": {"type": "str", "default": ""},
            "version": {"type": "str", "default": ""},
            "cuda": {"type": "bool", "default": True},
            "seconds": {"type": "int", "default": 60},
            "recorded": {"type": "bool", "default": False},
            "models": {"type": "list", "elements": "dict", "default": [], "options": canary.MODEL},
            "root": {"type": "path", "default": "/"},
        },
        required_if=[("state", "noted", ["step"])],
    )
    host = Host(Path(module.params["root"]))
    facts = host.facts()
    try:
        progress = rollout.load(host.progress)
        result = {"step": progress.step, "cause": progress.cause, "previous": progress.previous}
        result |= facts | settle(module, facts, host)
    except (rollout.Failed, dkms.Failed, kernels.Failed, OSError) as problem:
        module.fail_json(msg=str(problem), **facts)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
