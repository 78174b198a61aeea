#!/usr/bin/python
"""Whether a driver set fits a host, before anything is changed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_fit
short_description: Check a driver set against a host's GPUs, its next kernel and Secure Boot
description:
  - Reads PCI devices from sysfs, which needs no driver, and from the package lists the kernel that a flavour's headers are for.
  - Fails with one sentence per misfit. Changes nothing.
author: [llmkeep contributors (@llmkeep)]
options:
  driver_set: {description: The set., type: dict, required: true}
  flavour: {description: "Flavour of Debian's kernel, as in C(linux-headers-FLAVOUR).", type: str, required: true}
  signs: {description: Whether modules are signed., type: bool, required: true}
  devices: {description: sysfs' PCI devices., type: path, default: /sys/bus/pci/devices}
"""

EXAMPLES = r"""
- name: Check the driver set
  llmkeep.estate.driver_fit:
    driver_set: "{{ gpu_sets | selectattr('name', 'eq', gpu_set) | first }}"
    flavour: amd64
    signs: true
"""

RETURN = r"""
kernel: {description: Release of the kernel that boots next., returned: always, type: str}
gpus: {description: The GPUs by PCI address with their generation., returned: always, type: dict}
nvswitches: {description: Number of NVSwitches., returned: always, type: int}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import cards, dkms, driver_set


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "driver_set": {"type": "dict", "required": True},
            "flavour": {"type": "str", "required": True},
            "signs": {"type": "bool", "required": True},
            "devices": {"type": "path", "default": "/sys/bus/pci/devices"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    devices, switches = cards.inventory(Path(parameters["devices"]))
    try:
        kernel = dkms.next_kernel(parameters["flavour"])
    except dkms.Failed as problem:
        module.fail_json(msg=str(problem))
    wrong = list(
        driver_set.misfits(
            parameters["driver_set"],
            devices,
            switches,
            kernel,
            driver_set.secure_boot_is_on(),
            parameters["signs"],
        )
    )
    if wrong:
        module.fail_json(
            msg=f"The driver set does not fit this host; nothing was changed. {'. '.join(wrong)}."
        )
    module.exit_json(
        changed=False,
        kernel=kernel,
        gpus={card.address: card.generation for card in devices},
        nvswitches=switches,
    )


if __name__ == "__main__":
    main()
