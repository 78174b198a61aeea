#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: inventory_sane
short_description: Validate the inventory before any host is touched
description:
  - Refuses misspelt groups, variables and tags, values of the wrong type, hosts without an address or a feature, a
    several mirrors, volumes without an HSM, drivers too old for the locked CUDA, and models and jobs that
    their roles would refuse. Reports all faults at once, each with its hosts.
  - Then tries the control node's SSH port once, and fails with one sentence if it cannot be reached.
author: [llmkeep contributors (@llmkeep)]
options:
  roles: {description: Directory of the roles and their argument specifications., type: path, required: true}
  reach: {description: Whether to try the control node's SSH port., type: bool, default: true}
attributes:
  action: {description: An action plugin runs on the controller., support: full}
"""

EXAMPLES = r"""
- name: Validate the inventory
  llmkeep.estate.inventory_sane:
    roles: roles
  run_once: true
"""

RETURN = r"""
faults: {description: "Faults of the inventory, one line each.", returned: failure, type: list, elements: str}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    reach = {"type": "bool", "default": True}
    module = AnsibleModule(argument_spec={"roles": {"type": "path", "required": True}, "reach": reach})
    module.fail_json(msg="inventory_sane runs on the controller; its action plugin was not found")


if __name__ == "__main__":
    main()
