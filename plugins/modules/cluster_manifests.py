#!/usr/bin/python
"""State module: a Kubernetes cluster has what an overlay declares, with the image of a signed record, and it is healthy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: cluster_manifests
short_description: Deploy an overlay of manifests to a Kubernetes cluster, wait for health, and go back where it does not come
description:
  - Renders the overlay with the digest of a signed image record, and applies it from this host by server-side apply as the
    field manager C(llmkeep). Objects that were applied before and are declared no more are removed, after the others are
    healthy; namespaces, volumes and claims stay.
  - Refuses, before it changes anything, a kubeconfig that others can read or that does not verify the server, a cluster that
    is too old or lacks an API, missing rights, missing GPUs, an image that is not the record's, a record that has expired or is
    older than one deployed before, objects that others made, fields that others manage, and all that the API server refuses in
    a dry run.
  - If workloads do not become ready, the objects that were healthy before are applied again, and the module fails with the
    pods' reasons.
  - Check mode asks the API server by dry runs, and shows the difference.
author: [llmkeep contributors (@llmkeep)]
options:
  kubeconfig: {description: "File with the kubeconfig, mode 0600.", type: path, required: true}
  overlay: {description: Folder of a kustomization., type: path, required: true}
  image: {description: "C(image.json) of C(llmkeep image build), beside its signature.", type: path, required: true}
  keyring: {description: Keys of which one signed the image record., type: path, required: true}
  registry: {description: "Registry from which nodes pull, with its port if it is not 443.", type: str, required: true}
  replicas: {description: "Number of pods by name of the workload, where it is not the overlay's.", type: dict, default: {}}
  seen:
    description:
      - File that records the serial of the image that was deployed last, for all clusters together. An image of a lower serial is
        refused.
    type: path
    required: true
  allow_older:
    description: Why an image of a lower serial is deployed all the same. From then on its serial counts.
    type: str
    default: ""
  record: {description: "Folder of what was applied to this cluster, which the module keeps.", type: path, required: true}
  seconds: {description: How long workloads may take to become ready., type: int, default: 600}
"""

EXAMPLES = r"""
- name: Deploy
  llmkeep.estate.cluster_manifests:
    kubeconfig: /etc/llmkeep/kubernetes/main.kubeconfig
    overlay: /usr/local/share/llmkeep/kubernetes/overlays/gpu
    image: /etc/llmkeep/kubernetes/image.json
    keyring: /etc/apt/keyrings/llmkeep.pgp
    registry: registry.llmkeep.internal
    seen: /var/lib/llmkeep/kubernetes/image.serial
    record: /var/lib/llmkeep/kubernetes/main
"""

RETURN = r"""
changes:
  description: Objects that were or would be created, changed or removed, one line each.
  returned: always
  type: list
  elements: str
"""

import os
import shutil
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster import declared, rollout
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.deploy import Outcome, deployed
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.kubectl import (
    Cluster,
    Refused,
    judge_kubeconfig,
)
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.record import Record
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files


def run(module: AnsibleModule, cache: Path) -> Outcome:
    """What the run did or would do; Refused where it changed nothing."""
    parameters = module.params
    cluster = Cluster(Path(parameters["kubeconfig"]), cache)
    judge_kubeconfig(cluster.kubeconfig)
    serial_file = Path(parameters["seen"])
    last = declared.deployed_serial(serial_file)
    image = declared.image_record(
        Path(parameters["image"]), Path(parameters["keyring"]), 0 if parameters["allow_older"] else last
    )
    manifests = declared.rendered(
        cluster, Path(parameters["overlay"]), parameters["registry"], image, parameters["replicas"]
    )
    outcome = deployed(
        cluster, manifests, Record(Path(parameters["record"])), parameters["seconds"], module.check_mode
    )
    if image["serial"] != last and not outcome.refusal and not module.check_mode:
        files.write_file(serial_file, f"{image['serial']}\n".encode(), os.geteuid(), os.getegid(), 0o600)
    return outcome


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "kubeconfig": {"type": "path", "required": True},
            "overlay": {"type": "path", "required": True},
            "image": {"type": "path", "required": True},
            "keyring": {"type": "path", "required": True, "no_log": False},
            "registry": {"type": "str", "required": True},
            "replicas": {"type": "dict", "default": {}},
            "seen": {"type": "path", "required": True},
            "allow_older": {"type": "str", "default": ""},
            "record": {"type": "path", "required": True},
            "seconds": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    if module.check_mode and (shutil.which("kubectl") is None or not Path(module.params["overlay"]).exists()):
        module.warn("the cluster was not asked, since kubectl and the manifests would be installed before")
        module.exit_json(changed=True, changes=["everything"])
    try:
        with tempfile.TemporaryDirectory(prefix="llmkeep-kubectl-") as cache:
            outcome = run(module, Path(cache))
    except Refused as problem:
        module.fail_json(msg=f"{problem}. Nothing was changed in the cluster.", changes=[])
    for warning in outcome.warnings:
        module.warn(warning)
    diff = [
        {
            "before_header": each.line,
            "after_header": each.line,
            "before": rollout.text(each.before),
            "after": rollout.text(each.after),
        }
        for each in outcome.changes
    ]
    lines = [each.line for each in outcome.changes]
    if outcome.refusal:
        module.fail_json(msg=f"{outcome.refusal}.", changes=lines, diff=diff)
    module.exit_json(changed=bool(lines), changes=lines, diff=diff)


if __name__ == "__main__":
    main()
