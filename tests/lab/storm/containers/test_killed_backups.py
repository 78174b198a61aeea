"""Backups and restores that are killed at random: what is there stays whole, and the next run goes on."""

import json
import os
import random

import pytest
from estate import Lab, escrow_medium, lose_control_node

REPOSITORY = "sftp:root@10.77.0.12:/srv/backup"
KILLS = int(os.environ.get("STORM", "20"))
SECONDS = 6.0  # that either takes, and a little more
SEED = os.environ.get("SEED", "5")


@pytest.fixture(scope="module")
def backed_up(estate: Lab) -> Lab:
    estate.on("ops1", "cat > /etc/llmkeep/backup.json", given=json.dumps({"repository": REPOSITORY}))
    estate.on("ops1", "llmkeep backup create")
    return estate


def killed(lab: Lab, command: str, chance: random.Random) -> None:
    """Run it, and kill it with all that it started."""
    lab.on("ops1", f"timeout --signal=KILL {chance.uniform(0.1, SECONDS):.2f} {command}", check=False)


def test_a_killed_backup_leaves_a_repository_that_is_whole_and_the_next_one_is_made(backed_up: Lab) -> None:
    chance = random.Random(SEED)  # noqa: S311 no secret
    for number in range(KILLS):
        backed_up.on("ops1", f"head -c 2M /dev/urandom > /etc/llmkeep/change-{number}")
        killed(backed_up, "llmkeep backup create", chance)
        backed_up.on("ops1", "llmkeep backup verify")
    made = backed_up.on("ops1", "rm /etc/llmkeep/change-*; llmkeep backup create && llmkeep backup verify")
    assert "backups are intact" in made


def test_a_killed_restore_goes_on_to_a_whole_control_node(backed_up: Lab) -> None:
    before = backed_up.on("ops1", "llmkeep pki status")
    lose_control_node(backed_up)
    chance = random.Random(SEED)  # noqa: S311 no secret
    with escrow_medium(backed_up) as (key, passphrase):
        restore = f"llmkeep backup restore {REPOSITORY} --escrow-key {key} --passphrase-file {passphrase}"
        for _ in range(KILLS):
            killed(backed_up, restore, chance)
        # Unless one of them came to its end.
        ended = "test -e /etc/llmkeep/pki/root.pem && test ! -e /var/lib/llmkeep/restoring.json"
        backed_up.on("ops1", f"{{ {ended}; }} || {restore}")
    assert backed_up.on("ops1", "llmkeep pki status") == before
    backed_up.on("ops1", "llmkeep audit verify")
    policy = "/var/lib/llmkeep/policy/bundle.tar.gz --key /etc/llmkeep/policy/policy.pem"
    backed_up.on("ops1", f"llmkeep policy verify {policy}")
