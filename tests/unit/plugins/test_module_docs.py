"""The modules' documentation and argument specifications, by the validator of `ansible-test sanity`.

`ansible-test` itself would install the validator's requirements from the internet; the development environment has them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ansible_test
from plugin_modules import LINK, ROOT

VALIDATOR = Path(ansible_test.__file__).parent / "_util/controller/sanity/validate-modules/validate.py"
# The collection is Apache-2.0 and is not published with Ansible, which requires this header of its own modules.
NOT_OURS = {"missing-gplv3-license"}


def test_ansible_test_finds_no_fault_in_the_modules() -> None:
    modules = sorted(f"plugins/modules/{path.name}" for path in (ROOT / "plugins/modules").glob("[!_]*.py"))
    collection = "ansible_collections/llmkeep/estate"
    paths = {
        "ANSIBLE_COLLECTIONS_PATH": str(LINK.parents[2]),
        "PYTHONPATH": f"{Path(ansible_test.__file__).parents[1]}:{LINK.parents[2]}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, VALIDATOR, "--collection", collection, "--arg-spec", "--format", "json", *modules],
        cwd=LINK,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [
        f"{name}: {error['code']}: {error['msg']}"
        for name, found in json.loads(done.stdout).items()
        for error in found["errors"]
        if error["code"] not in NOT_OURS
    ]
    assert errors == [], done.stderr
