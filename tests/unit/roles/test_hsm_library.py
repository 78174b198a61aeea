"""llmkeep-hsm on a host: the role hsm lays out every module that the program imports."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from plugin_modules import ROOT

ROLE = ROOT / "roles/hsm"
PACKAGE = "ansible_collections/llmkeep/estate/plugins/module_utils"


def test_the_role_lays_out_every_module_that_the_program_imports(tmp_path: Path) -> None:
    shipped = re.findall(r"__hsm_utilities ~ '/([\w/]+\.py)'", (ROLE / "tasks/configure.yml").read_text())
    for name in shipped:
        (tmp_path / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "plugins/module_utils" / name, tmp_path / PACKAGE / name)
    (program,) = (ROLE / "files").glob("llmkeep-hsm*")
    module = re.search(r"python3 -P -m (\S+)", program.read_text())
    assert module
    done = subprocess.run(
        ["/usr/bin/python3.13", "-P", "-m", module[1]],
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout)["fault"] == "settings"  # this machine has no /etc/llmkeep/hsm.json
