"""playbooks/verify.yml: what a host cannot enforce stands on its own, in what is printed and in the report."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import LINK, ROOT, load

load("filter.estate")  # puts the collection where Ansible finds it

HELD = {"id": "opa.runs", "title": "OPA is running", "expected": "active", "observed": "active", "ok": True}
OPEN = {
    "id": "opa.memory_is_bounded",
    "title": "OPA's memory is bounded",
    "expected": "bounded",
    "observed": "not enforced",
    "ok": False,
    "not_enforceable": "no memory controller",
}
ACCEPTED = {
    "id": "base.system_is_tested",
    "title": "The system is tested",
    "expected": "debian 13",
    "observed": "debian 14",
    "ok": False,
    "accepted": "Debian 14 was never tested, and base_untested_system accepts it",
}
FAILED = {
    "id": "opa.runs",
    "title": "OPA is running",
    "expected": "active",
    "observed": "inactive",
    "ok": False,
}


def reported(
    folder: Path,
    checks: list[dict[str, Any]],
    limit: str = "all,localhost",
    facts: dict[str, list[str]] | None = None,
) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and report of the playbook's last play, where the roles have said CHECKS of one host."""
    (report,) = [
        play
        for play in yaml.safe_load((ROOT / "playbooks/verify.yml").read_text())
        if play["name"] == "Report the results"
    ]
    (folder / "verify.yml").write_text(yaml.safe_dump([report]))
    (folder / "hosts.yml").write_text(
        yaml.safe_dump({"all": {"hosts": {"llm1": {"llmkeep_checks": checks, **(facts or {})}}}})
    )
    return played(folder, "verify.yml", "-l", limit)


def played(folder: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code and output of a playbook over hosts.yml, and the report that it wrote."""
    run = subprocess.run(
        ["ansible-playbook", "-i", "hosts.yml", "-e", f"verify_report={folder}/report.json", *words],
        cwd=folder,
        env=os.environ
        | {
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(LINK.parents[2]),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    report_file = folder / "report.json"
    return run.returncode, run.stdout, json.loads(report_file.read_text()) if report_file.exists() else {}


def test_what_the_inventory_accepts_is_listed_and_is_no_failure(tmp_path: Path) -> None:
    ended, output, report = reported(tmp_path, [HELD, ACCEPTED])
    line = f"llm1: base.system_is_tested: {ACCEPTED['accepted']}"
    assert (ended, report["ok"], report["accepted"]) == (0, True, [line])
    assert "1 of 2 checks do not hold, and the inventory accepts that." in output
    assert line in " ".join(output.split())  # Ansible breaks long lines
    assert "1 checks hold on 1 hosts." in output


@pytest.mark.parametrize(
    ("checks", "code", "ok", "told"),
    [
        ([HELD], 0, True, ["1 checks hold on 1 hosts."]),
        (
            [HELD, OPEN],
            0,
            True,
            [
                "1 of 2 checks are not enforceable on their hosts.",
                "llm1: opa.memory_is_bounded: no memory controller",
                "1 checks hold on 1 hosts. 1 are not enforceable there.",
            ],
        ),
        (
            [FAILED, OPEN],
            2,
            False,
            [
                "1 of 2 checks do not hold.",
                "llm1: opa.runs (OPA is running): expected active; observed inactive",
                "llm1: opa.memory_is_bounded: no memory controller",
            ],
        ),
    ],
    ids=["held", "not enforceable", "failed"],
)
def test_what_is_not_enforceable_is_listed_and_is_no_failure(
    tmp_path: Path, checks: list[dict[str, Any]], code: int, ok: bool, told: list[str]
) -> None:
    ended, output, report = reported(tmp_path, checks)
    assert (ended, report["ok"], report["checks"]) == (code, ok, len(checks))
    assert report["not_enforceable"] == (
        ["llm1: opa.memory_is_bounded: no memory controller"] if OPEN in checks else []
    )
    for line in told:
        assert line in output, output
    assert ("not enforceable" in output) == (OPEN in checks)


def test_a_limit_that_names_no_host_is_refused_instead_of_reported_as_done(tmp_path: Path) -> None:
    ended, output, report = reported(tmp_path, [HELD], limit="llm1,lm1,localhost")
    assert (ended, report) == (2, {})
    assert "the limit lm1 is not a host or group; did you mean llm1?" in " ".join(output.split())


def test_the_report_has_each_host_s_roles_and_those_whose_checks_ran_to_their_end(tmp_path: Path) -> None:
    _, _, report = reported(
        tmp_path, [HELD], facts={"llmkeep_roles": ["base", "opa"], "llmkeep_verified": ["opa"]}
    )
    assert (report["roles"], report["verified"]) == ({"llm1": ["base", "opa"]}, {"llm1": ["opa"]})


def test_a_host_that_does_not_answer_has_no_roles(tmp_path: Path) -> None:
    _, _, report = reported(tmp_path, [HELD])
    assert (report["roles"], report["verified"]) == ({"llm1": []}, {"llm1": []})


ROWS = [
    {"role": "base", "hosts": "all"},
    {"role": "edge", "hosts": "edge"},
    {"role": "opa", "hosts": "serve"},
]
HOSTS: dict[str, dict[str, dict[str, dict[str, str]]]] = {
    "edge": {"hosts": {"edge1": {}}},
    "serve": {"hosts": {"llm1": {}}},
}
ONE_CHECK = [
    {
        "name": "Check",
        "ansible.builtin.set_fact": {
            "llmkeep_checks": "{{ llmkeep_checks | default([]) + [{'id': verified_role, 'ok': true}] }}",
            "llmkeep_verified": "{{ llmkeep_verified | default([]) + [verified_role] }}",
        },
    }
]


def verified(folder: Path, **variables: list[str]) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and report of the playbook over two hosts, of whose roles each has one check, which holds."""
    plays = yaml.safe_load((ROOT / "playbooks/verify.yml").read_text())
    files = {
        "playbooks/verify.yml": [plays[0] | {"gather_facts": False}, *plays[1:]],
        "playbooks/tasks/verify_role.yml": ONE_CHECK,
        "meta/features.yml": {"features": ROWS},
        "hosts.yml": {"all": {"children": HOSTS, "vars": {"ansible_connection": "local"}}},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return played(folder, "playbooks/verify.yml", "-e", json.dumps(variables))


@pytest.mark.parametrize(
    ("chosen", "roles"),
    [
        ({}, {"edge1": ["base", "edge"], "llm1": ["base", "opa"]}),
        ({"verify_roles": ["opa"]}, {"edge1": [], "llm1": ["opa"]}),
        ({"verify_skipped_roles": ["base"]}, {"edge1": ["edge"], "llm1": ["opa"]}),
    ],
    ids=["all", "one role", "all but one role"],
)
def test_the_checks_of_chosen_roles_run(
    tmp_path: Path, chosen: dict[str, list[str]], roles: dict[str, list[str]]
) -> None:
    ended, output, report = verified(tmp_path, **chosen)
    assert (ended, report["ok"], report["verified"]) == (0, True, roles), output


def test_a_choice_of_roles_that_no_host_has_is_refused_with_those_that_hosts_have(tmp_path: Path) -> None:
    ended, output, report = verified(tmp_path, verify_roles=["oap"])
    assert (ended, report) == (2, {})
    assert "The hosts have base, edge, opa." in " ".join(output.split())
