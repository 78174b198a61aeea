#!/usr/bin/python
"""State module: a kernel and its driver, held together; the kernel boots once and is the default only after it was accepted."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_pair
short_description: Hold a kernel with its driver, and choose by GRUB which kernel boots
description:
  - C(kept), before anything is installed, makes the running kernel GRUB's default by name, so that a newer one does not boot
    because it is newer, and frees the packages for their move.
  - C(next) holds the packages and has GRUB boot I(kernel) a single time. It is refused while Secure Boot is on and
    I(certificate) is not enrolled. Where I(kernel) runs with the driver I(version), it becomes the default.
  - A host that has no kernel of its own, such as a container, boots what it is given; then only packages are held.
author: [llmkeep contributors (@llmkeep)]
options:
  kernel: {description: "Release of the new kernel, as C(uname -r) prints it.", type: str, required: true}
  state: {description: What boots., type: str, choices: [kept, next], required: true}
  version: {description: Version of the driver., type: str, required: true}
  packages: {description: Packages that move together., type: list, elements: str, required: true}
  certificate: {description: Certificate (DER) that verifies the driver's modules., type: path}
"""

EXAMPLES = r"""
- name: Boot the new kernel once
  llmkeep.estate.kernel_pair:
    kernel: 6.12.118+deb13-amd64
    state: next
    version: 580.105.08
    packages: [linux-image-6.12.118+deb13-amd64, nvidia-kernel-open-dkms]
    certificate: /etc/llmkeep/modules/modules.der
"""

RETURN = r"""
running: {description: The kernel that runs., returned: always, type: str}
own_kernel: {description: Whether the host boots a kernel of its own., returned: always, type: bool}
accepted: {description: Whether the kernel runs with this driver., returned: always, type: bool}
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import kernels, secure_boot

BOOT = Path("/boot")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "kernel": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["kept", "next"], "required": True},
            "version": {"type": "str", "required": True},
            "packages": {"type": "list", "elements": "str", "required": True},
            "certificate": {"type": "path"},
        },
        supports_check_mode=True,
    )
    parameters, check = module.params, module.check_mode
    keep = parameters["state"] == "kept"
    running = os.uname().release
    own = kernels.boots_itself(BOOT, running)
    accepted = parameters["kernel"] == running and kernels.is_accepted(parameters["version"])
    try:
        refusal = ""
        if own and not keep and parameters["kernel"] != running and parameters["certificate"]:
            refusal = secure_boot.state_of(Path(parameters["certificate"]))
        moved = kernels.hold(parameters["packages"], free=keep, check=check)
        chose = kernels.choose(
            parameters["kernel"],
            running,
            keep=keep,
            accepted=accepted,
            refusal=refusal,
            boot=BOOT,
            check=check,
        )
    except (kernels.Failed, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=chose or bool(moved), running=running, own_kernel=own, accepted=accepted)


if __name__ == "__main__":
    main()
