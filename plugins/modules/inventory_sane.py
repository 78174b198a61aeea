#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: inventory_sane
short_description: Validate the inventory before any host is touched
description:
  - Refuses a variable with a role's prefix that the role does not define, a value of the wrong type, a host in no group
    of the estate, a host with encrypted volumes but no HSM, and an estate without control node or mirror. Reports all
    problems at once.
  - Then tries the control node's SSH port once, and fails with one sentence if it cannot be reached.
author: [llmkeep contributors]
options:
  roles: {description: Directory of the roles and their argument specifications., type: path, required: true}
attributes:
  action: {support: full}
"""

EXAMPLES = r"""
- name: Validate the inventory
  llmkeep.estate.inventory_sane:
    roles: roles
  run_once: true
"""

RETURN = r"""
problems: {description: "Problems of the inventory, one line each.", returned: failure, type: list, elements: str}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    module = AnsibleModule(argument_spec={"roles": {"type": "path", "required": True}})
    module.fail_json(msg="inventory_sane runs on the controller; its action plugin was not found")


if __name__ == "__main__":
    main()
