#!/usr/bin/python
"""Module that reads what a host has installed, for its SBOM."""

from __future__ import annotations

DOCUMENTATION = r"""
module: installed_components
short_description: Read what a host has installed, for its SBOM
description:
  - Debian packages; below C(/home), C(/opt), C(/root), C(/srv) and C(/usr/local) Python distributions, programs in machine code,
    models and vendored scripts; kernel modules that no package has as a file, and those of others that the kernel runs.
  - Bundles and releases, which have a signed manifest, are carried and not installed, and so are left out. So are file systems
    of other hosts, which C(skipped) names.
  - Changes nothing, and runs nothing but C(dpkg-query).
author: [llmkeep contributors (@llmkeep)]
options:
  root: {description: Where the host's files lie; a test names a folder., type: path, default: /}
attributes:
  check_mode: {description: Reads in check mode as well., support: full}
"""

EXAMPLES = r"""
- name: Read what is installed
  llmkeep.estate.installed_components:
"""

RETURN = r"""
msg: {description: The components as JSON., returned: always, type: str}
"""

import json
import zipfile
from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.bundle import components
from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import Failed
from ansible_collections.llmkeep.estate.plugins.module_utils.patch import upgrades
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused


def main() -> None:
    module = AnsibleModule(argument_spec={"root": {"type": "path", "default": "/"}}, supports_check_mode=True)
    try:
        installed = components.read(Path(module.params["root"]), upgrades.run)
    except (Failed, Refused, OSError, ValueError, zipfile.BadZipFile) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=False, msg=json.dumps(asdict(installed), separators=(",", ":")))


if __name__ == "__main__":
    main()
