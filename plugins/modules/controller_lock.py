#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: controller_lock
short_description: Hold a lock on the control node for the duration of this Ansible run
description:
  - A separate process logs in to the host by SSH, takes C(flock) on the file there, and keeps the connection open.
    It ends with the run that started it, and the kernel of the control node then releases the lock. A controller
    that is killed, or that loses its power or its network, leaves no lock behind.
  - Fails with the name of the holder if another run has the lock.
author: [llmkeep contributors (@llmkeep)]
options:
  path: {description: The lock file on the host., type: path, required: true}
attributes:
  action: {description: An action plugin runs on the controller., support: full}
"""

EXAMPLES = r"""
- name: Refuse to run beside another controller
  llmkeep.estate.controller_lock:
    path: /run/llmkeep/controller.lock
  delegate_to: "{{ groups['control'][0] }}"
  run_once: true
"""

RETURN = r"""
holder: {description: Holder named in the lock file., returned: always, type: str}
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    module = AnsibleModule(argument_spec={"path": {"type": "path", "required": True}})
    module.fail_json(msg="controller_lock runs on the controller; its action plugin was not found")


if __name__ == "__main__":
    main()
