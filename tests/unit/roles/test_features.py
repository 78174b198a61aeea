"""meta/features.yml and what repeats it: roles, playbooks, scenarios and their table."""

import re
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
import yaml
from plugin_modules import ROOT, load

roles_of = load("filter.estate").roles_of
rules = load("plugin_utils.inventory")
FEATURES: list[dict[str, Any]] = yaml.safe_load((ROOT / "meta/features.yml").read_text())["features"]
ROLES = [row["role"] for row in FEATURES]
EVERY_GROUP = sorted(rules.GROUPS)


def with_hosts(pattern: str, groups: list[str]) -> str:
    """A pattern as Ansible makes it in an estate with hosts in these groups."""
    return (
        jinja2.Environment(autoescape=True).from_string(pattern).render(groups=dict.fromkeys(groups, "llm1"))
    )


def plays_of_site() -> Iterator[dict[str, Any]]:
    for step in yaml.safe_load((ROOT / "site.yml").read_text()):
        yield from yaml.safe_load((ROOT / step["ansible.builtin.import_playbook"]).read_text())


def installed_by_site(groups: list[str], of_host: list[str]) -> list[str]:
    plays = [
        {"role": given["role"], "hosts": with_hosts(play["hosts"], groups)}
        for play in plays_of_site()
        for given in play.get("roles", [])
    ]
    return list(dict.fromkeys(roles_of(plays, of_host)))


def verified(groups: list[str], of_host: list[str]) -> list[str]:
    rows = [row | {"hosts": with_hosts(row["hosts"], groups)} for row in FEATURES]
    return list(roles_of(rows, of_host))


@pytest.mark.parametrize(
    "absent", [[], ["redis"], ["prometheus"], ["chat"], ["prometheus", "chat"], ["edge"]]
)
@pytest.mark.parametrize("group", [[], *([group] for group in EVERY_GROUP), ["serve", "gpu"], EVERY_GROUP])
def test_a_host_is_verified_for_what_site_installs_in_the_same_order(
    group: list[str], absent: list[str]
) -> None:
    groups = [name for name in EVERY_GROUP if name not in absent]
    of_host = [name for name in group if name not in absent]
    assert verified(groups, of_host) == installed_by_site(groups, of_host)


def test_each_role_is_a_feature_and_has_a_scenario() -> None:
    folders = {path.name for path in (ROOT / "roles").glob("[!_]*/")}
    scenarios = {path.parent.name for path in ROOT.glob("molecule/*/scenario.yml")}
    assert (folders, scenarios) == (set(ROLES), set(ROLES))


def test_a_pattern_takes_unions_intersections_and_exclusions() -> None:
    rows = [{"role": "gpu_health", "hosts": "serve:train:&gpu:!without_python"}]
    assert roles_of(rows, ["train", "gpu"]) == ["gpu_health"]
    assert roles_of(rows, ["serve"]) == []
    assert roles_of(rows, ["gpu"]) == []
    assert roles_of(rows, ["serve", "gpu", "without_python"]) == []


def test_groups_that_a_feature_needs_are_groups_of_the_estate() -> None:
    assert {group for row in rules.FEATURES for needed in row["needs"] for group in needed.split(":")} <= set(
        rules.GROUPS
    )


def test_the_page_on_tests_says_of_each_scenario_what_is_real_in_it() -> None:
    table = (ROOT / "docs/develop/test-tiers.md").read_text().split("## Scenarios")[1].split("\n## ")[0]
    named = [role for row in re.findall(r"^\| ([\w, ]+) \|", table, re.MULTILINE) for role in row.split(", ")]
    assert sorted(named) == sorted(["role", *ROLES])
