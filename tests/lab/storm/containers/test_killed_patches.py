"""Patches that are killed at random: the host is patched or has its packages of before, and the next run goes on."""

import os
import random

import pytest
from estate import Client, Lab, answers, give_canary_key, make_older, patch, within

PACKAGE = "libssl3t64"
KILLS = int(os.environ.get("STORM", "20"))
SECONDS = 60.0  # that a patch takes, and a little more
GIVEN = ("--hosts llm1", "--canary-key-file /root/canary.json", "--last-instance", "--without-rollback")


@pytest.fixture(scope="module")
def keyed(estate: Lab) -> Lab:
    """The estate, whose models a patch may ask."""
    give_canary_key(estate)
    return estate


def test_a_killed_patch_goes_on_and_a_person_is_answered_all_the_same(keyed: Lab, client: Client) -> None:
    chance = random.Random(os.environ.get("SEED", "5"))  # noqa: S311 no secret
    newest = keyed.on("llm1", f"dpkg-query --show {PACKAGE}")
    for _ in range(KILLS):
        make_older(keyed, "llm1", PACKAGE)
        command = " ".join(["llmkeep patch -i inventory/lab", *GIVEN])
        keyed.on("ops1", f"timeout --signal=KILL {chance.uniform(1, SECONDS):.1f} {command}", check=False)
        output = patch(keyed, *GIVEN)
        assert output.endswith("ended with 0"), output[-3000:]
        assert keyed.on("llm1", f"dpkg-query --show {PACKAGE}") == newest
        assert keyed.on("llm1", "dpkg --audit") == ""
        within(120, "an answer", lambda: "Paris" in answers(client))
