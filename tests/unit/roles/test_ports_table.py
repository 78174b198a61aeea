"""The table of ports in docs/operate/estate.md is what the roles' firewall rules open."""

import re

import yaml
from plugin_modules import ROOT

# What a rule takes from an entry of an inventory's list, and the variable that has the list.
FROM_LISTS = {"to.port": "llm_serving_models", "pod.port": "prometheus_clusters"}
RULE = re.compile(r"\b(?:(tcp|udp) dport (.*)|l4proto (esp|112)(?: meta skuid root)?) accept$")


def ports_in_rules() -> set[tuple[str, str]]:
    """Role, and number with protocol or name of a variable, of each port in an accepting rule of a template."""
    found = set()
    for path in (ROOT / "roles").glob("*/templates/*nft*.j2"):
        role = path.parents[1].name
        for line in path.read_text().splitlines():
            found |= {(role, name) for name in re.findall(r"^\{\{ opened\((\w+)", line)}
            rule = RULE.search(line)
            if rule is None or "entry.port" in line:
                continue
            protocol, port, esp = rule.groups()
            names = re.findall(r"\{\{ ([\w.]+) \}\}", port or "")
            found |= {(role, FROM_LISTS.get(name, name)) for name in names or [esp or f"{port}/{protocol}"]}
    return found


def rows() -> list[list[str]]:
    text = (ROOT / "docs/operate/estate.md").read_text().partition("## Ports")[2].partition("\n## ")[0]
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in cells] for cells in table[2:]]


def test_the_table_has_each_port_that_a_role_opens_and_no_other() -> None:
    told = {(role, variable or port) for port, variable, roles, *_ in rows() for role in roles.split(", ")}
    assert told == ports_in_rules()


def test_the_numbers_in_the_table_are_the_defaults() -> None:
    defaults: dict[str, object] = {}
    for path in (ROOT / "roles").glob("*/defaults/main.yml"):
        defaults |= yaml.safe_load(path.read_text())
    numbers = {variable: port.partition("/")[0] for port, variable, *_ in rows() if "/" in port and variable}
    assert numbers == {name: str(defaults[name]) for name in numbers}
