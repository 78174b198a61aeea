"""What a role makes of an inventory, without a host: its expressions evaluated by Ansible, its units judged by systemd."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from plugin_modules import LINK, ROOT

# Renders as the action plugin of config_tree does, and keeps what the module would be given.
RECORDED_TREE = """
from ansible_collections.llmkeep.estate.plugins.action import config_tree

class ActionModule(config_tree.ActionModule):
    def _execute_module(self, module_name=None, module_args=None, task_vars=None):
        return {"changed": False, "tree": module_args}
"""
# Writes text to a file, in the controller: ansible.builtin.copy starts two modules for it, which is half of a run's CPU.
WRITTEN_TEXT = """
import pathlib
from ansible.plugins.action import ActionBase

class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        pathlib.Path(self._task.args["path"]).write_text(self._task.args["text"])
        return {}
"""
EXPOSURE = 15  # tenths, of systemd's ten: as the roles' own checks


def played(folder: Path, play: dict[str, Any], estate: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """One play on ESTATE (hosts, children, vars), without a host: Ansible's exit code and output."""
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": estate}))
    return subprocess.run(
        [ROOT / ".venv/bin/ansible-playbook", "-i", "hosts.yml", "play.yml"],
        cwd=folder,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(LINK.parents[2]), "ANSIBLE_CONFIG": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def rendered(
    folder: Path,
    role: str,
    wanted: dict[str, str],
    host: str,
    hosts: dict[str, str],
    variables: dict[str, Any],
    groups: dict[str, list[str]] | None = None,
    configured: bool = False,
    inventory: dict[str, Any] | None = None,
    host_vars: dict[str, dict[str, Any]] | None = None,
) -> Any:
    """Expressions as Ansible evaluates them on HOST with a role's variables and templates; HOSTS are full names and addresses.
    INVENTORY: variables of all hosts. HOST_VARS: of single ones, by name.

    CONFIGURED: with `tree`, what the role's last config_tree in tasks/configure.yml is given, its templates rendered.
    """
    for kind in ("templates", "files"):
        (folder / kind).symlink_to(ROOT / f"roles/{role}/{kind}")
    files = [
        str(ROOT / f"roles/{of}")
        for of in ("_common/defaults/main.yml", *(f"{role}/{kind}/main.yml" for kind in ("defaults", "vars")))
    ]
    (folder / "given.yml").write_text(yaml.safe_dump(variables))
    tasks: list[dict[str, Any]] = []
    if configured:
        tasks.append({"recorded_tree": configuration(role), "register": "recorded"})
        wanted = {**wanted, "tree": "recorded.tree"}
    write = {
        "written_text": {
            "path": str(folder / "out.json"),
            "text": "{{ {"
            + ", ".join(f"'{name}': {text}" for name, text in wanted.items())
            + "} | to_json }}",
        }
    }
    play = {
        "hosts": host,
        "connection": "local",
        "gather_facts": False,
        "vars_files": [*files, str(folder / "given.yml")],
        "tasks": [*tasks, write],
    }
    short = {name.split(".")[0]: address for name, address in hosts.items()}
    estate = {
        name: {"ansible_host": address, **(host_vars or {}).get(name, {})} for name, address in short.items()
    }
    children = {group: {"hosts": dict.fromkeys(members)} for group, members in (groups or {}).items()}
    (folder / "action_plugins").mkdir()
    (folder / "action_plugins/recorded_tree.py").write_text(RECORDED_TREE)
    (folder / "action_plugins/written_text.py").write_text(WRITTEN_TEXT)
    run = played(folder, play, {"hosts": estate, "children": children, "vars": inventory or {}})
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((folder / "out.json").read_text())


def configuration(role: str) -> dict[str, Any]:
    """Arguments of the last config_tree in a role's tasks/configure.yml."""
    tasks = yaml.safe_load((ROOT / f"roles/{role}/tasks/configure.yml").read_text())
    found: dict[str, Any] = [task for task in tasks if "llmkeep.estate.config_tree" in task][-1][
        "llmkeep.estate.config_tree"
    ]
    return found


def absent(made: Any) -> list[str]:
    """The files that the role would remove."""
    return [entry["dest"] for entry in made["tree"]["files"] if entry.get("state") == "absent"]


def content(made: Any, end: str) -> str:
    """The content of the one file whose path ends with END."""
    present = [entry for entry in made["tree"]["files"] if entry.get("state") != "absent"]
    (found,) = (str(entry["content"]) for entry in present if entry["dest"].endswith(end))
    return found


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
