#!/usr/bin/python
"""State module: the declared settings of a host's GPUs, through llm-gpu."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_settings
short_description: Bring ECC, MIG, persistence, power limit and compute mode of GPUs to what is declared
description:
  - Runs C(llm-gpu settings), which shows what differs, refuses what a GPU cannot take before anything is set, and sets the rest.
  - A change of MIG drains the engines of that GPU on the audit record first. It fails, with everything as it was, while the last
    instance of a model or another program is on it.
  - What comes only with a reset of the GPU or a reboot is a warning, and no change in the next run.
  - In check mode nothing is set; a release that does not have the command yet has nothing to show.
author: [llmkeep contributors (@llmkeep)]
options:
  program: {description: Path of llm-gpu., type: path, required: true}
  config: {description: "Its configuration as it will be, which need not be in place yet.", type: str, required: true}
  take_last: {description: Change MIG under the last instance of a model as well., type: bool, default: false}
"""

EXAMPLES = r"""
- name: Set the GPUs as declared
  llmkeep.estate.gpu_settings:
    program: /opt/llmkeep/current/bin/llm-gpu
    config: "{{ lookup('ansible.builtin.template', 'gpu.yaml.j2') }}"
"""

RETURN = r"""
waiting: {description: "What comes with a reset or a reboot, one sentence each.", returned: success, type: list, elements: str}
"""

import json

from ansible.module_utils.basic import AnsibleModule

UNKNOWN = "invalid choice: 'settings'"


def lines(differences: list[dict[str, str]], moment: str) -> str:
    """The settings before or after, one line each, for a diff."""
    return "".join(f"GPU {each['gpu']}: {each['setting']}: {each[moment]}\n" for each in differences)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "program": {"type": "path", "required": True},
            "config": {"type": "str", "required": True},
            "take_last": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    command = [parameters["program"], "settings", "--config", "/dev/stdin", "--json"]
    command += ["--check"] if module.check_mode else []
    command += ["--take-last"] if parameters["take_last"] else []
    code, out, err = module.run_command(command, data=parameters["config"], binary_data=False)
    if code == 2 and module.check_mode and UNKNOWN in err:
        module.exit_json(changed=False, waiting=[])
    if code != 0:
        module.fail_json(
            msg=f"The GPUs are not set as declared. {err.strip().removeprefix('llm-gpu: ')}", rc=code
        )
    answer = json.loads(out)
    waiting = [
        f"GPU {each['gpu']}: {each['setting']} is {each['after']} after a reset of the GPU or a reboot"
        for each in answer["waiting"]
    ]
    for sentence in waiting:
        module.warn(sentence)
    diff = {"before": lines(answer["due"], "before"), "after": lines(answer["due"], "after")}
    module.exit_json(
        changed=bool(answer["due"]),
        waiting=waiting,
        diff={**diff, "before_header": "GPUs", "after_header": "GPUs"},
    )


if __name__ == "__main__":
    main()
