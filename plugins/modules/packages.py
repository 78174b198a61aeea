#!/usr/bin/python
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: packages
short_description: Install Debian packages on a host that may have lost its power while it installed some
description:
  - C(ansible.builtin.apt) without recommended packages, without starting services, and with patience for another apt.
  - Before the first packages of a run, what dpkg had begun and not ended is completed by C(dpkg --configure -a), and what was
    cut while it was unpacked comes again from the mirror. That counts as a change. In check mode it is only said.
  - Packages that dpkg has already cost no call of apt. One that fails to read the lists anew is left to it, with its patience.
author: [llmkeep contributors]
options:
  name: {description: Packages., type: list, elements: str, required: true}
  state: {description: Whether they are there., type: str, choices: [present, absent], default: present}
  purge: {description: Take the configuration away with a package., type: bool, default: false}
  update_cache: {description: Read the sources' lists anew first., type: bool, default: false}
attributes:
  action: {support: full}
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Install Redis
  llmkeep.estate.packages:
    name: [redis-server, redis-tools]
"""

RETURN = r"""
completed:
  description: What an interrupted installation had left half done.
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
