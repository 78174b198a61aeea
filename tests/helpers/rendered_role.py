"""What a role makes of an inventory, without a host: its expressions evaluated by Ansible, its units judged by systemd."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from plugin_modules import LINK, ROOT

EXPOSURE = 15  # tenths, of systemd's ten: as the roles' own checks


def rendered(
    folder: Path,
    role: str,
    wanted: dict[str, str],
    host: str,
    hosts: dict[str, str],
    variables: dict[str, Any],
    groups: dict[str, list[str]] | None = None,
) -> Any:
    """Expressions as Ansible evaluates them on HOST with a role's variables and templates; HOSTS are full names and addresses."""
    for kind in ("templates", "files"):
        (folder / kind).symlink_to(ROOT / f"roles/{role}/{kind}")
    files = [
        str(ROOT / f"roles/{of}")
        for of in ("_common/defaults/main.yml", *(f"{role}/{kind}/main.yml" for kind in ("defaults", "vars")))
    ]
    (folder / "given.yml").write_text(yaml.safe_dump(variables))
    task = {
        "ansible.builtin.copy": {
            "dest": str(folder / "out.json"),
            "content": "{{ {"
            + ", ".join(f"'{name}': {text}" for name, text in wanted.items())
            + "} | to_json }}",
        }
    }
    play = {
        "hosts": host,
        "connection": "local",
        "gather_facts": False,
        "vars_files": [*files, str(folder / "given.yml")],
        "tasks": [task],
    }
    estate = {name.split(".")[0]: {"ansible_host": address} for name, address in hosts.items()}
    children = {group: {"hosts": dict.fromkeys(members)} for group, members in (groups or {}).items()}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": estate, "children": children}}))
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(LINK.parents[2]), "ANSIBLE_CONFIG": ""}
    run = subprocess.run(
        [str(ROOT / ".venv/bin/ansible-playbook"), "-i", str(folder / "hosts.yml"), str(folder / "play.yml")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((folder / "out.json").read_text())


def hardened(folder: Path, name: str, text: str, exposure: int = EXPOSURE) -> None:
    """systemd understands the unit, and finds it hardened."""
    unit = folder / name
    unit.write_text(text)
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={exposure}", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout[-1500:] + judged.stderr
    unit.write_text(
        "".join(line for line in text.splitlines(True) if not line.startswith("Exec"))
        + "[Service]\nExecStart=true\n"
    )
    read = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    strange = [line for line in read.stderr.splitlines() if name in line]
    assert not strange, strange
