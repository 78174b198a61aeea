"""Before any host is touched: inventories that are wrong, and two controllers at once."""

import re
import time
from pathlib import Path

import pytest
import yaml
from estate import ROOT, Lab

PLAYBOOK = str(ROOT / ".venv/bin/ansible-playbook")


def inventory(folder: Path, hosts: dict[str, dict[str, object]], groups: dict[str, list[str]]) -> Path:
    """An inventory file with these hosts' variables and these groups."""
    members: dict[str, dict[str, object]] = {
        group: {"hosts": dict.fromkeys(names)} for group, names in groups.items()
    }
    path = folder / "hosts.yml"
    path.write_text(yaml.safe_dump({"all": {"hosts": hosts, "children": members}}))
    return path


ESTATE = {"control": ["ops1"], "mirror": ["ops1"], "serve": ["llm1"], "edge": ["llm1"]}
WRONG: dict[str, tuple[dict[str, object], dict[str, list[str]], str]] = {
    "an unknown variable": ({"pki_extra_name": ["x"]}, ESTATE, "did you mean pki_extra_names?"),
    "a wrong type": ({"mirror_port": "many"}, ESTATE, "mirror_port is 'many'"),
    "a host in no group": (
        {},
        {"control": ["ops1"], "mirror": ["ops1"]},
        "llm1: it is in no group",
    ),
    "no control node": ({}, {"mirror": ["ops1"], "serve": ["llm1"]}, "the group control is empty"),
    "another domain than the authority's": (
        {"base_domain": "other.internal"},
        ESTATE,
        "set base_domain to that",
    ),
    "no SSH from where the run comes from": (
        {"base_ssh_from": []},
        ESTATE,
        "llm1, ops1 would refuse SSH from 10.77.0.2",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_inventory_with_this_is_refused_and_nothing_changes(floor: Lab, tmp_path: Path, what: str) -> None:
    variables, groups, told = WRONG[what]
    hosts: dict[str, dict[str, object]] = {
        name: {"ansible_host": address, "ansible_user": "root", "base_ssh_from": ["10.77.0.2"], **variables}
        for name, address in (("ops1", "10.77.0.11"), ("llm1", "10.77.0.12"))
    }
    # --limit leaves out the control node, and none of its checks.
    command = (PLAYBOOK, "-i", str(inventory(tmp_path, hosts, groups)), "site.yml", "--limit", "llm1")
    done = floor.outside(*command, check=False)
    assert done.returncode != 0
    assert told in " ".join(done.stdout.split())
    assert not re.search(r"changed=[1-9]", done.stdout)
    assert "base :" not in done.stdout


def test_a_tag_that_selects_nothing_is_refused(floor: Lab) -> None:
    done = floor.outside(PLAYBOOK, "-i", "inventory/lab", "site.yml", "--tags", "llm-serving", check=False)
    assert done.returncode != 0
    assert "the tag llm-serving selects nothing; did you mean llm_serving?" in " ".join(done.stdout.split())


def test_a_second_controller_is_refused_and_a_killed_one_leaves_no_lock(floor: Lab) -> None:
    preflight = (PLAYBOOK, "-i", "inventory/lab", "playbooks/preflight.yml")
    renew = "llmkeep run playbooks/renew.yml -i /etc/llmkeep/renew/hosts.yml"
    floor.on("ops1", f"systemd-run --quiet --collect --unit=first --setenv=HOME=/root {renew}")
    # By a look: to try it would hold it for a moment, in which the first one would be refused. And by who has the file, since a
    # container's /proc/locks does not show what a process took that is gone. Only who has the lock is a `cat`.
    free = (
        "for cat in $(pgrep --exact cat); do "
        "[ $(readlink /proc/$cat/fd/9) = /run/llmkeep/controller.lock ] && echo held && exit; done; echo free"
    )
    end = time.monotonic() + 120
    while floor.on("ops1", free).strip() != "held":
        assert time.monotonic() < end, floor.on("ops1", "journalctl --no-pager -u first")
        time.sleep(0.2)
    # It stands still, or it could be done before the second one asks.
    floor.on("ops1", "systemctl kill --signal=STOP first.service")
    second = floor.outside(*preflight, check=False)
    assert second.returncode != 0
    assert "another controller is at work on this estate (root@ops1" in " ".join(second.stdout.split())
    floor.on("ops1", "systemctl kill --signal=KILL first.service")
    end = time.monotonic() + 15
    while floor.on("ops1", free).strip() != "free":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert floor.outside(*preflight).returncode == 0
