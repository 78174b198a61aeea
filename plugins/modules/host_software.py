#!/usr/bin/python
"""Module that reads what a host has installed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_software
short_description: Read what a host has installed, and which units run it
description:
  - Debian packages with their source packages, distributions of the Python environments in use, vendored scripts, and for
    each of them the units whose processes map a file of it.
  - Changes nothing, and runs nothing but C(dpkg-query).
author: [llmkeep contributors (@llmkeep)]
options:
  root: {description: Where the host's files lie; a test names a folder., type: path, default: /}
attributes:
  check_mode: {description: Reads in check mode as well., support: full}
"""

EXAMPLES = r"""
- name: Read what is installed
  llmkeep.estate.host_software:
"""

RETURN = r"""
msg:
  description: >-
    JSON with C(release), C(kernel), C(packages), C(python), C(scripts) and C(replaced), units that run replaced files.
  returned: always
  type: str
"""

import json
import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import Failed
from ansible_collections.llmkeep.estate.plugins.module_utils.patch import services, software, upgrades


def main() -> None:
    module = AnsibleModule(argument_spec={"root": {"type": "path", "default": "/"}}, supports_check_mode=True)
    root, kernel = Path(module.params["root"]), os.uname().release
    try:
        # Without those of this run.
        mapped = services.mapped(root / "proc", Path("/proc/self/cgroup").read_text())
        units, opt = software.users(mapped), root / "opt"
        read: dict[str, Any] = {
            "release": software.release(root / "etc/os-release"),
            "kernel": kernel,
            "packages": software.packages(upgrades.run, root / "var/lib/dpkg/info", kernel, units),
            "python": software.distributions(opt, units),
            "scripts": software.scripts(opt),
            "replaced": software.replaced(mapped),
        }
        if not software.visible(root / "proc"):
            for row in (*read["packages"], *read["python"]):
                row[-1] = None
    except (Failed, OSError, ValueError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=False, msg=json.dumps(read, separators=(",", ":")))


if __name__ == "__main__":
    main()
