"""granted_action.py BUNDLE: OPA's decision on the first action that the policy in BUNDLE grants to a role.

It is printed as opa-query prints it.

The officer decides what a policy grants, and to whom, so the question is taken from the policy that OPA loaded.
"""

import json
import os
import sys
import tarfile
from pathlib import Path

QUERY = "/usr/local/lib/llmkeep/opa-query"


def question(bundle: Path) -> dict[str, object]:
    with tarfile.open(bundle) as archive:
        member = archive.extractfile("llm/roles/data.json")
        roles = json.load(member) if member else {}
    role, action = next((name, role["actions"][0]) for name, role in sorted(roles.items()) if role["actions"])
    return {"input": {"subject": "verify@llmkeep", "tenant": "verify", "roles": [role], "action": action}}


def main() -> None:
    asked = json.dumps(question(Path(sys.argv[1])))
    os.execv(QUERY, [QUERY, "POST", "/v1/data/llm/authz/decision", asked])  # noqa: S606 -- no shell is wanted


if __name__ == "__main__":
    main()
