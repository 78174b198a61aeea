#!/usr/bin/python
"""A question to each model of a host, before and after its driver is changed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: serving_canary
short_description: Ask a host's models through its own gateways, or at their engines
description:
  - C(answered) asks each gateway's socket a new question for each model, until it says 200 with at least one token; a model with
    C(socket) is asked at that engine. A refusal of the key or of the request ends it at once.
  - C(quiet) waits until the gateways have answered what they began, and the engines of C(models) with C(socket). Requests that
    are left are no failure.
  - Changes nothing.
author: [llmkeep contributors (@llmkeep)]
options:
  state: {description: What to wait for., type: str, choices: [answered, quiet], default: answered}
  models:
    description: Models to ask.
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: Name that clients use., type: str, required: true}
      embeds: {description: Whether it answers with embeddings., type: bool, default: false}
      socket: {description: UNIX socket of its engine., type: path}
      http: {description: Whether a server of OpenAI's API listens there., type: bool, default: false}
      credential: {description: Sealed credential of this host with that server's key., type: str, default: ""}
  key: {description: An API key that may ask them., type: str}
  seconds: {description: Longest time to wait., type: int, required: true}
  root: {description: Where the host's files lie; a test names a folder., type: path, default: /}
"""

EXAMPLES = r"""
- name: Ask the model
  llmkeep.estate.serving_canary:
    models: [{name: deepseek-v2.5}]
    key: "{{ canary_key }}"
    seconds: 1200
"""

RETURN = r"""
in_flight: {description: Requests that were still being answered., returned: when quiet, type: int}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import canary


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["answered", "quiet"], "default": "answered"},
            "models": {"type": "list", "elements": "dict", "default": [], "options": canary.MODEL},
            "key": {"type": "str", "no_log": True},
            "seconds": {"type": "int", "required": True},
            "root": {"type": "path", "default": "/"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    root = Path(parameters["root"])
    folder = root / "run/llm-gateway"
    engines = canary.engines(parameters["models"], root)
    if parameters["state"] == "quiet":
        module.exit_json(changed=False, in_flight=canary.quiet(folder, engines, parameters["seconds"]))
    try:
        models = [model for model in parameters["models"] if not model["socket"]] + engines
        canary.answered(folder, models, parameters["key"] or "", parameters["seconds"])
    except canary.Failed as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()
