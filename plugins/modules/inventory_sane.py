#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: inventory_sane
short_description: Refuse an inventory that no role would understand, before any host is touched
description:
  - A variable that starts with a role's name and is none of its variables, a value of a wrong
    type, a host in no group of the estate, a host with encrypted
    volumes and no HSM, an estate without control node or mirror. All problems are told at once.
  - Then it tries the control node's SSH port, once, and says in one sentence when it cannot be reached.
author: [llmkeep contributors]
options:
  roles: {description: Folder of the roles, whose argument specifications count., type: path, required: true}
attributes:
  action: {support: full}
"""

EXAMPLES = r"""
- name: Refuse an inventory that is not sane
  llmkeep.estate.inventory_sane:
    roles: roles
  run_once: true
"""

RETURN = r"""
problems: {description: What is wrong., returned: failure, type: list, elements: str}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    module = AnsibleModule(argument_spec={"roles": {"type": "path", "required": True}})
    module.fail_json(msg="inventory_sane runs on the controller; its action plugin was not found")


if __name__ == "__main__":
    main()
