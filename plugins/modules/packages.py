#!/usr/bin/python
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: packages
short_description: Install Debian packages, and repair an interrupted installation first
description:
  - C(ansible.builtin.apt) without recommended packages and without starting services; it waits for another apt's lock.
  - Before the first packages of a run, an interrupted installation is completed by C(dpkg --configure -a), and half-unpacked
    packages are installed again from the mirror. That counts as a change. Check mode only reports it.
  - In check mode, apt is not called on a host that does not have the estate's package source yet; the packages count as a change.
  - If dpkg has all packages already, apt is not called. A failed update of the package lists is left to apt and its retries.
author: [llmkeep contributors (@llmkeep)]
options:
  name: {description: Packages., type: list, elements: str, required: true}
  state: {description: Whether the packages are installed or removed., type: str, choices: [present, absent], default: present}
  purge: {description: Remove a package's configuration too., type: bool, default: false}
  update_cache: {description: Update the package lists first., type: bool, default: false}
attributes:
  action: {description: An action plugin runs on the controller., support: full}
  check_mode: {description: Reports the changes without making them., support: full}
"""

EXAMPLES = r"""
- name: Install Redis
  llmkeep.estate.packages:
    name: [redis-server, redis-tools]
"""

RETURN = r"""
completed:
  description: Remains of an interrupted installation that were or would be repaired.
  returned: always
  type: list
  elements: str
  sample: ["entries in dpkg's journal: 3", "nginx-common is unpacked"]
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "purge": {"type": "bool", "default": False},
            "update_cache": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    module.fail_json(msg="packages runs on the controller first; its action plugin was not found")


if __name__ == "__main__":
    main()
