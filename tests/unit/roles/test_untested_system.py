"""A host with a system on which llmkeep was never tested: refused, or accepted by the inventory and on record."""

from pathlib import Path

import pytest
from plugin_modules import load
from rendered_role import played

load("filter.estate")  # puts the collection where Ansible finds it


def preflight(folder: Path, facts: dict[str, str], **variables: str) -> tuple[int, str]:
    """Exit code and output of all roles' preflight on a host with these facts."""
    common = {"name": "llmkeep.estate._common", "tasks_from": "preflight", "rolespec_validate": False}
    tasks = [
        {"ansible.builtin.set_fact": {**facts, "cacheable": True}},
        {"ansible.builtin.import_role": common},
    ]
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "vars": variables,
        "tasks": tasks,
    }
    run = played(folder, play, {"hosts": {"localhost": {}}})
    return run.returncode, run.stdout + run.stderr


DEBIAN_14 = {"distribution": "Debian", "distribution_major_version": "14", "os_family": "Debian"}
FEDORA = {"distribution": "Fedora", "distribution_major_version": "43", "os_family": "RedHat"}


@pytest.mark.parametrize(
    ("facts", "variables", "code", "told"),
    [
        (
            DEBIAN_14,
            {},
            2,
            "localhost runs Debian 14, on which llmkeep was never tested; nothing was changed.",
        ),
        (
            DEBIAN_14,
            {"base_untested_system": "accept"},
            0,
            "localhost: base.system_is_tested: Debian 14 was never tested, and base_untested_system accepts it",
        ),
        (
            FEDORA,
            {"base_untested_system": "accept"},
            2,
            "localhost belongs to the OS family RedHat, but llmkeep supports the packages and paths of Debian only",
        ),
        (
            {**DEBIAN_14, "pkg_mgr": "dnf"},
            {"base_untested_system": "accept"},
            2,
            "localhost installs packages with dnf, but llmkeep supports apt only",
        ),
    ],
    ids=["refused", "accepted", "another family", "another package manager"],
)
def test_an_untested_system_is_refused_unless_the_inventory_accepts_it_and_is_of_a_known_family(
    tmp_path: Path, facts: dict[str, str], variables: dict[str, str], code: int, told: str
) -> None:
    ended, output = preflight(tmp_path, facts, **variables)
    assert ended == code, output
    assert told in " ".join(output.split()), output
