"""The firewall of the role base: what an inventory opens beside what the roles declare."""

from pathlib import Path

import pytest
from plugin_modules import ROOT
from rendered_role import rendered

HOSTS = {"llm1.estate.internal": "10.0.0.12", "ops1.estate.internal": "10.0.0.11"}
GROUPS = {"control": ["ops1"], "mirror": ["ops1"], "serve": ["llm1"]}
RULES = {"rules": "lookup('ansible.builtin.template', 'nftables.conf.j2')"}


def chain(folder: Path, name: str, **opened: object) -> list[str]:
    """The rules of a chain of llm1's firewall, in order."""
    given = {"role_path": str(ROOT / "roles/base"), **opened}
    text: str = rendered(folder, "base", RULES, "llm1", HOSTS, given, GROUPS)["rules"]
    return [line.strip() for line in text.split(f"chain {name} {{")[-1].split("}\n")[0].splitlines()]


@pytest.mark.parametrize(
    ("variable", "name", "side"), [("base_open_in", "input", "saddr"), ("base_open_out", "output", "daddr")]
)
def test_what_the_inventory_opens_is_accepted_before_the_rest_is_refused(
    tmp_path: Path, variable: str, name: str, side: str
) -> None:
    opened = [
        {"addresses": ["10.20.30.40", "2001:db8::/64"], "port": "1792"},
        {"addresses": ["10.9.0.0/16"], "port": "9000-9010", "protocol": "udp"},
    ]
    rules = chain(tmp_path, name, **{variable: opened})
    wanted = [
        f"ip {side} 10.20.30.40 tcp dport 1792 accept",
        f"ip6 {side} 2001:db8::/64 tcp dport 1792 accept",
        f"ip {side} 10.9.0.0/16 udp dport 9000-9010 accept",
    ]
    assert [rule for rule in rules if rule in wanted] == wanted
    assert rules.index(wanted[-1]) < rules.index(
        next(rule for rule in rules if rule.endswith(" drop") and "counter" in rule)
    )


def test_nothing_is_opened_by_default(tmp_path: Path) -> None:
    assert [rule for rule in chain(tmp_path, "output") if rule.startswith("ip ")] == [
        "ip daddr 10.0.0.11 tcp sport 22 tcp flags & syn == 0 accept",
        "ip daddr 10.0.0.11 tcp dport 8443 accept",
        "ip daddr 10.0.0.11 udp dport 123 accept",
    ]
