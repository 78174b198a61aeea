#!/usr/bin/python
"""State module: Elasticsearch's superuser has its sealed password, and templates are those of the role."""

from __future__ import annotations

DOCUMENTATION = r"""
module: search_settings
short_description: Retire Elasticsearch's first password, and install documents such as index templates and roles
description:
  - Gives the superuser the password in the sealed credential C(elasticsearch.elastic), by the one of the first start
    (C(elasticsearch.bootstrap)), which is refused from then on.
  - Puts each document that is missing or differs. Keys that Elasticsearch adds are ignored.
  - Runs on the host of Elasticsearch.
author: [llmkeep contributors (@llmkeep)]
options:
  documents:
    description: Bodies by path, such as C(_index_template/NAME) or C(_security/role/NAME), in the order in which they are put.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Install a template
  llmkeep.estate.search_settings:
    documents:
      _index_template/logs: {index_patterns: ["logs-*"], data_stream: {}}
"""

RETURN = r"""
changes: {description: "Changes that were or would be made, one line each.", returned: always, type: list, elements: str}
"""

import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import sealing
from ansible_collections.llmkeep.estate.plugins.module_utils.search import ask

SEALED = Path("/etc/credstore.encrypted/elasticsearch.elastic")
SECONDS = 60
PLURALS = {"_component_template": "component_template", "_index_template": "index_template"}


def superuser_knows(user: str) -> bool:
    """Does Elasticsearch take the password in the sealed credential of this user (`elastic` or `bootstrap`)?"""
    return bool(ask.ask("GET", "/_security/_authenticate", user=user)[0] == 200)


def retire_the_first_password(check: bool) -> list[str]:
    """Change the superuser's password where it is still the first one. Refused if it is neither for so many SECONDS.

    Until its users can be read, a starting Elasticsearch refuses the right password, too, with 401.
    """
    end = time.monotonic() + SECONDS
    while not superuser_knows("elastic"):
        if superuser_knows("bootstrap"):
            if not check:
                password = sealing.unseal(SEALED.name, SEALED.read_bytes()).decode()
                ask.do("POST", "/_security/user/elastic/_password", {"password": password}, user="bootstrap")
                ask.do("GET", "/_security/_authenticate")
            return ["password of the superuser"]
        if time.monotonic() >= end:
            raise ask.Refused(
                f"for {SECONDS} s Elasticsearch refused both passwords of its superuser, in the credentials "
                f"elasticsearch.elastic and elasticsearch.bootstrap of {SEALED.parent}: seal the one that it has as "
                "elasticsearch.elastic"
            )
        time.sleep(0.5)
    return []


def current(path: str) -> Any:
    """The document as Elasticsearch has it; None if it has none."""
    answer = ask.document(f"/{path}")
    api = path.partition("/")[0]
    if answer is None or api not in PLURALS:
        return answer and answer[path.rpartition("/")[2]]
    return answer[f"{PLURALS[api]}s"][0][PLURALS[api]]


def main() -> None:
    module = AnsibleModule(
        argument_spec={"documents": {"type": "dict", "required": True}}, supports_check_mode=True
    )
    documents: dict[str, Any] = module.params["documents"]
    if module.check_mode and not ask.there():
        module.exit_json(changed=True, changes=["everything"])
    try:
        changes = retire_the_first_password(module.check_mode)
        if changes and module.check_mode:
            module.exit_json(changed=True, changes=[*changes, *documents])
        for path, body in documents.items():
            if not ask.has(current(path), body):
                changes.append(path)
                if not module.check_mode:
                    ask.do("PUT", f"/{path}", body)
    except (ask.Refused, sealing.Failed, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=bool(changes), changes=changes)


if __name__ == "__main__":
    main()
