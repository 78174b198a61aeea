"""Newer Debian packages for an estate that serves: each host is brought to them, or goes back to those that it had."""

import re

import pytest
from estate import Client, Lab, answers, give_canary_key, load, make_older, patch, within

# What nginx, gateways, engines, the record and Redis have mapped, and what nothing runs. `~` sorts before the bundle's version.
PACKAGES = ("libssl3t64", "openssl")
OLDER_VERSION = "~ "
VERSIONS = "dpkg-query --show --showformat='${Version} ' " + " ".join(PACKAGES)
RECORDED = "llm-serve audit show --json | grep -o 'host.patch_[a-z]*'"
GIVEN = ("--canary-key-file /root/canary.json", "--last-instance", "--without-rollback")


@pytest.fixture(scope="module")
def older(estate: Lab) -> Lab:
    """The estate, whose llm1 has two packages just below the bundle's versions."""
    give_canary_key(estate)
    make_older(estate, "llm1", *PACKAGES)
    return estate


def test_the_plan_names_what_is_newer_and_changes_nothing(older: Lab) -> None:
    before = older.on("llm1", VERSIONS)
    output = patch(older, "--plan", *GIVEN)
    assert output.endswith("ended with 0"), output[-3000:]
    for name in PACKAGES:
        assert re.search(rf"{name} \S+~ -> \S+", output), output[-3000:]
    assert "llm1: would upgrade." in output
    assert older.on("llm1", VERSIONS) == before


def test_a_host_that_alone_serves_a_model_is_refused(older: Lab) -> None:
    output = patch(older, "--hosts llm1", "--canary-key-file /root/canary.json")
    assert output.endswith("ended with 1")
    assert "it would take away the last instance of smollm2-135m-instruct, on llm1" in output


def test_a_host_whose_checks_do_not_hold_afterwards_goes_back(older: Lab, client: Client) -> None:
    before = older.on("llm1", VERSIONS)
    older.on("llm1", "sed --in-place 's/^hosts:.*/hosts: files dns/' /etc/nsswitch.conf")
    output = patch(older, "--hosts llm1", *GIVEN)
    older.on("llm1", "sed --in-place 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf")
    assert output.endswith("ended with 1"), output[-3000:]
    assert (
        "The patch of llm1 was rolled back: Refuse a host with failed checks: llm1: base.only_files" in output
    )
    assert older.on("llm1", VERSIONS) == before
    assert older.on("llm1", RECORDED).split()[-1] == "host.patch_returned"
    assert "Paris" in answers(client)


def test_all_hosts_are_patched_under_load_and_restart_what_ran_replaced_files(
    older: Lab, client: Client
) -> None:
    pids = "systemctl show --property=MainPID --value nginx redis-server llm-audit 'llm-gateway@*' 'llm-engine@*'"
    before = older.on("llm1", pids).split()
    with load(older, client) as statuses:
        output = patch(older, *GIVEN)
    assert output.endswith("ended with 0"), output[-3000:]
    assert set(statuses) == {200}
    assert OLDER_VERSION not in older.on("llm1", VERSIONS)
    assert not {*before} & {*older.on("llm1", pids).split()}
    assert older.on("llm1", RECORDED).split()[-1] == "host.patch_done"
    assert "Paris" in answers(client)


def test_a_second_patch_replaces_no_package(older: Lab) -> None:
    before = older.on("llm1", VERSIONS)
    output = patch(older, *GIVEN)
    assert output.endswith("ended with 0"), output[-3000:]
    assert "ops1: skip. it has nothing newer to get" in output
    assert older.on("llm1", VERSIONS) == before


def test_a_patched_host_goes_back_to_the_packages_that_it_had(older: Lab, client: Client) -> None:
    output = patch(older, "--back", "--hosts llm1", *GIVEN)
    assert output.endswith("ended with 0"), output[-3000:]
    assert older.on("llm1", VERSIONS).count(OLDER_VERSION) == len(PACKAGES)
    within(60, "an answer", lambda: "Paris" in answers(client))
