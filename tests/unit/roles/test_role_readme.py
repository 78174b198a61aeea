"""Each role's README says what its argument specification says."""

import re
from pathlib import Path

import pytest
import roledoc
import yaml

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("role", roledoc.ROLES, ids=lambda role: role.name)
def test_readme_is_what_the_specification_says(role: Path) -> None:
    written = (role / "README.md").read_text()
    assert written == roledoc.render(role), "run .venv/bin/python tests/helpers/roledoc.py"


def test_the_list_of_roles_is_that_of_features() -> None:
    assert (ROOT / "roles/README.md").read_text() == roledoc.listed(), (
        "run .venv/bin/python tests/helpers/roledoc.py"
    )


def test_sub_options_are_listed_below_their_variable() -> None:
    nested = {"type": "dict", "description": "a", "options": {"b": {"type": "int", "description": "c"}}}
    option = {"type": "list", "elements": "dict", "description": "d", "options": {"e": nested}}
    assert roledoc.entries("top", option) == [
        "- `top` (list of dict, `derived`): d.",
        "  - `e` (dict, `derived`): a.",
        "    - `b` (int, `derived`): c.",
    ]


def test_shared_variables_name_the_role_that_declares_them() -> None:
    assert "- `hsm_token` (of _common, str, `llmkeep`)" in (ROOT / "roles/luks/README.md").read_text()
    assert "- `hsm_relay` (of hsm, str, " in (ROOT / "roles/edge/README.md").read_text()


@pytest.mark.parametrize("role", roledoc.ROLES, ids=lambda role: role.name)
def test_no_line_of_an_entry_begins_a_list_of_its_own(role: Path) -> None:
    lines = (role / "README.md").read_text().partition("## Variables")[2].splitlines()
    assert [line for line in lines if re.match(r" *([-+*>]|\d+[.)]) (?!`)", line)] == []


def test_what_a_role_does_to_a_host_is_read_from_its_tasks_and_variables() -> None:
    changes = {role.name: roledoc.changes(role) for role in roledoc.ROLES}
    assert changes["redis"]["Packages"] == ["redis-server", "redis-tools"]
    assert "/etc/redis/users.acl" in changes["redis"]["Files"]
    assert changes["redis"]["Units"] == ["redis-server.service"]
    assert "/etc/systemd/system/llm-engine@*.service.d/memory.conf" in changes["llm_serving"]["Files"]
    assert "elasticsearch" in changes["elasticsearch"]["Packages"], (
        "the vendor's, not what the lab has for it"
    )
    assert any(changes["luks"].values())


@pytest.mark.parametrize("role", roledoc.ROLES, ids=lambda role: role.name)
def test_a_default_in_the_specification_is_the_role_s_default(role: Path) -> None:
    options = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"][
        "options"
    ]
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text()) or {}
    stated = {name: option["default"] for name, option in options.items() if "default" in option}
    assert {name: roledoc.shown(value) for name, value in stated.items()} == {
        name: roledoc.shown(defaults[name]) for name in stated
    }


@pytest.mark.parametrize("role", roledoc.ROLES, ids=lambda role: role.name)
def test_every_check_has_a_title_for_people(role: Path) -> None:
    for check in roledoc.checks(role):
        title = check.get("title", "")
        assert 8 <= len(title) <= 90, f"{check['id']}: {title!r}"
        assert not re.search(r"\n|\{\{|\.$", title), f"{check['id']}: {title!r}"


def test_no_two_checks_have_one_id() -> None:
    ids = [check["id"] for role in roledoc.ROLES for check in roledoc.checks(role)]
    assert len(ids) == len(set(ids)) > 200
