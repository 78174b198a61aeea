"""A module as Ansible calls it, in this process.

Not in luks_estate: that one also runs on hosts, which have neither pytest nor Ansible.
"""

import json
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args


def called(
    module: ModuleType, given: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """What a module says when it is run with what is given."""
    with patch_module_args(given), pytest.raises(SystemExit):
        module.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found
