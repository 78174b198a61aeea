"""The rules that the roles' firewalls will have on hosts of an inventory, rendered from the roles' own templates.

`llmkeep.inventory.flows` runs this file as a program of its own: Ansible finds a collection's filters by the environment that
it starts with. Standard input: root, groups, hostvars and the hosts to render, as JSON; standard output: `addresses`,
`rules` and `unread`.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

RULES = "/etc/nftables"  # begins the path of each file of rules, those in nftables.d included
ACCEPTED = re.compile(
    r"^\s*(?:ip6? (?P<side>[sd])addr (?P<address>\S+) )?.*?"
    r"(?:\b(?P<protocol>tcp|udp) dport (?P<port>\{[^}]*\}|\S+)|\bl4proto (?P<ip>\w+)).* accept$"
)


def trusted(value: Any) -> Any:
    """A value of the operator's inventory, whose templates Ansible may evaluate."""
    if isinstance(value, dict):
        return {key: trusted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [trusted(each) for each in value]
    return trust_as_template(value) if isinstance(value, str) else value


def members(pattern: str, groups: dict[str, list[str]]) -> set[str]:
    """Hosts of a pattern such as `serve:train:&gpu`; as Ansible, unions first."""
    parts = [(part[0] if part[0] in "&!" else "", part.lstrip("&!")) for part in pattern.split(":")]
    hosts: set[str] = set()
    for sign in ("", "&", "!"):
        for group in [set(groups.get(name, [])) for mark, name in parts if mark == sign]:
            hosts = {"": hosts | group, "&": hosts & group, "!": hosts - group}[sign]
    return hosts


def rule_files(
    tasks: dict[str, Any], node: Any, conditions: tuple[Any, ...] = ()
) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Entries that render rules (dest, template, perhaps state), each with the conditions of the tasks that lead to it.

    TASKS: a role's files of tasks by name, whose includes are followed from NODE.
    """
    if isinstance(node, list):
        for each in node:
            yield from rule_files(tasks, each, conditions)
    if isinstance(node, dict):
        when = node.get("when", [])
        conditions = (*conditions, *(when if isinstance(when, list) else [when]))
        for verb in ("include_tasks", "import_tasks"):
            include = node.get(f"ansible.builtin.{verb}")
            name = include["file"] if isinstance(include, dict) else include
            yield from rule_files(tasks, tasks.get(str(name)), conditions)
        if "template" in node and str(node.get("dest", "")).startswith(RULES):
            yield node, conditions
        yield from rule_files(tasks, [*node.values()], conditions)


def accepted(text: str, dest: str) -> Iterator[tuple[str, str, str]]:
    """Direction (`in` or `out`), address (empty: any) and port of each rule that accepts new connections."""
    for line in text.splitlines():
        if rule := ACCEPTED.match(line):
            outward = rule["side"] == "d" or (not rule["side"] and "/output-" in dest)
            port = (rule["port"] or "").strip("{} ")
            protocol = f"{port}/{rule['protocol']}" if port else f"IP protocol {rule['ip']}"
            yield "out" if outward else "in", rule["address"] or "", protocol


def main() -> None:
    request = json.load(sys.stdin)
    root, groups = Path(request["root"]), request["groups"]
    init_plugin_loader()
    loader = DataLoader()

    def loaded(pattern: str) -> dict[str, Any]:
        """Documents of the files that match, by path."""
        paths = sorted(root.glob(pattern))
        return {str(path): loader.load_from_file(str(path), trusted_as_template=True) or {} for path in paths}

    defaults: dict[str, Any] = {}
    for values in loaded("roles/*/defaults/main.yml").values():
        defaults |= values
    hostvars = {host: trusted(values) for host, values in request["hostvars"].items()}
    addresses = {
        host: Templar(loader=loader, variables=values).template(values.get("ansible_host", host))
        for host, values in hostvars.items()
    }
    rules, unread = [], []
    (table,) = loaded("meta/features.yml").values()
    for row in table["features"]:
        role = root / "roles" / row["role"]
        tasks = {
            Path(path).name: document for path, document in loaded(f"roles/{row['role']}/tasks/*.yml").items()
        }
        files = [*rule_files(tasks, tasks.get("main.yml"))]
        own = {
            name: value
            for document in loaded(f"roles/{row['role']}/vars/main.yml").values()
            for name, value in document.items()
        }
        for host in request["hosts"] if files else []:
            variables = {
                **defaults,
                **hostvars[host],
                **own,
                "groups": groups,
                "hostvars": hostvars,
                "inventory_hostname": host,
                "group_names": [name for name, hosts in groups.items() if host in hosts],
                "role_path": str(role),
            }
            templar = Templar(loader=loader, variables=variables)
            if host not in members(templar.template(row["hosts"]), groups):
                continue
            ports = {
                str(value): name for name, value in variables.items() if name.endswith(("_port", "_ports"))
            }
            for file, conditions in files:
                try:
                    if not all(map(templar.evaluate_conditional, conditions)):
                        continue
                    if templar.template(file.get("state", "present")) == "absent":
                        continue
                    source = (role / "templates" / file["template"]).read_text()
                    text = templar.template(trust_as_template(source)) or ""
                except Exception as error:  # Ansible has a dozen kinds
                    unread.append({"host": host, "role": row["role"], "reason": str(error).splitlines()[0]})
                    continue
                rules += [
                    {
                        "host": host,
                        "role": row["role"],
                        "direction": direction,
                        "address": address,
                        "port": port,
                    }
                    | {"variables": [ports[each] for each in re.split(", |/", port) if each in ports]}
                    for direction, address, port in accepted(text, file["dest"])
                ]
    json.dump({"addresses": addresses, "rules": rules, "unread": unread}, sys.stdout)


if __name__ == "__main__":
    main()
