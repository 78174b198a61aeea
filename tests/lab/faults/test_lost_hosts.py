"""A control node and a serving host die, and blank machines take their names: that of the control node by a backup on another
host and the escrow key alone."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import sharded_deepseek
from estate import (
    QUESTION,
    ROOT,
    Client,
    Lab,
    answers,
    changed,
    escrow_medium,
    lose_control_node,
    open_client,
    request,
    sign_and_add,
    within,
)

REPOSITORY = "sftp:root@10.77.0.12:/srv/backup"
SET_UP = f"-e backup_repository={REPOSITORY}"
COLLECT = "llmkeep audit collect -i inventory/lab"
MODEL = {"name": "tiny", "driver": "naive", "release": "tiny", "memory": "1G", "context": 512, "threads": 1}
MODELS = {"serve": {"vars": {"llm_serving_models": [MODEL]}}}


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it comes on its medium."""
    folder = tmp_path_factory.mktemp("model")
    repository = sharded_deepseek.write(folder / "repository")
    command = [str(ROOT / ".venv/bin/llmkeep"), "model", "add", str(repository), "--name", "tiny"]
    subprocess.run(
        [*command, "--into", str(folder / "candidate"), "--accept-licence", "deepseek"], check=True
    )
    return folder / "candidate"


@pytest.fixture(scope="module")
def trusted_before(estate: Lab, client: Client, candidate: Path) -> str:
    """What llm1 trusted and ran, once the control node has signed a release, is backed up, and is gone."""
    answers(client)
    estate.send("ops1", "/root", {"candidate": candidate})
    sign_and_add(estate, "/root/candidate")
    estate.site("--tags backup", SET_UP)
    assert "verified" in estate.on("ops1", "llmkeep backup list")
    # The run that made the backup ended after it.
    estate.on("ops1", COLLECT)
    before = trusted(estate)
    lose_control_node(estate)
    return before


def trusted(lab: Lab) -> str:
    """Of llm1: certificates, policy's key and bundle, keys of the estate, and since when its services run."""
    files = "find /etc/llmkeep /etc/credstore.encrypted /var/lib/llm* -xdev -type f -regex '.*[.]\\(pem\\|pgp\\|gz\\)'"
    since = "systemctl show --property=ActiveEnterTimestampMonotonic nginx opa 'llm-gateway@*' 'llm-engine@*'"
    return lab.on("llm1", f"{files} | sort | xargs sha256sum; {since}")


@dataclass(frozen=True)
class Restored:
    """A blank machine once it is the control node. `message`, `finding`: of the restore, and of the record's tail that was
    lost; `trusted`: by llm1, before."""

    message: str
    finding: str
    trusted: str


@pytest.fixture(scope="module")
def restored(estate: Lab, trusted_before: str) -> Restored:
    """As the operator does it, with the escrow key on a medium."""
    with escrow_medium(estate) as (key, passphrase):
        words = f"{REPOSITORY} --escrow-key {key} --passphrase-file {passphrase}"
        message = estate.on("ops1", f"llmkeep backup restore {words}")
    estate.on("ops1", f"{COLLECT}; test $? = 3")
    finding = estate.on("ops1", "llmkeep audit findings; test $? = 3")
    estate.on("llm1", "mv /var/lib/llm-audit-witness/ops1 /root/")
    estate.on("ops1", f"llmkeep audit acknowledge {finding.split()[0]} --reason restored && {COLLECT}")
    return Restored(message, finding, trusted_before)


def test_the_estates_own_roles_change_nothing_on_another_host(
    estate: Lab, client: Client, restored: Restored
) -> None:
    assert "  tiny 1: llmkeep release add FOLDER" in restored.message
    assert changed(estate.site(SET_UP))["llm1"] == 0
    assert trusted(estate) == restored.trusted
    assert "Paris" in answers(client)


@pytest.mark.usefixtures("restored")
def test_its_record_goes_on_where_it_ended(estate: Lab) -> None:
    assert estate.on("ops1", "llmkeep audit verify")
    assert "restore backup" in estate.on("ops1", "llmkeep audit show --json")


def test_runs_recorded_after_the_backup_are_a_finding(restored: Restored) -> None:
    assert "or this node was restored from a backup older than those" in restored.finding


@pytest.mark.usefixtures("restored")
def test_it_issues_a_certificate_that_the_estate_accepts(estate: Lab) -> None:
    estate.on("llm1", "mv /etc/llmkeep/pki/host.pem /root/")
    assert changed(estate.site("--tags pki", "--limit llm1"))["llm1"] > 0
    estate.on(
        "llm1",
        "cd /etc/llmkeep/pki && openssl verify -CAfile root.pem -untrusted host.pem host.pem && ! cmp -s host.pem /root/host.pem",
    )


@pytest.mark.usefixtures("restored")
def test_it_adds_a_key_that_opens_the_door(estate: Lab, client: Client) -> None:
    words = "identity_verb=add identity_subject=ada@lab identity_tenant=lab identity_roles=developer identity_file=/root/ada.json"
    estate.operate("run playbooks/identities.yml", *(f"-e {word}" for word in words.split()))
    key = json.loads(estate.on("ops1", "cat /root/ada.json"))["key"]
    within(30, "the key is known", lambda: request(client, "GET", "/v1/models", key=key)[0] == 200)


@pytest.mark.usefixtures("restored")
def test_a_dead_host_is_replaced_under_its_name_and_gets_a_release_of_before(
    estate: Lab, candidate: Path
) -> None:
    old = estate.on("llm1", "cat /etc/llmkeep/pki/host.pem")
    replace = estate.command("host replace", "llm1", "--reason dead")
    assert "is a host of this estate, and no blank machine" in estate.on("ops1", f"{replace} 2>&1; true")
    estate.send("ops1", "/root", {"candidate": candidate})
    # Of this release the mirror had nothing but its signature.
    estate.on("ops1", "llmkeep release add /root/candidate")
    estate.run("restore", "llm1", "bare")
    output = estate.on("ops1", replace)
    assert "lost, unless backed up: the record, " in output
    estate.on("ops1", "cat > /root/models.json", given=json.dumps(MODELS))
    estate.site("-i /root/models.json", SET_UP)
    assert estate.on("llm1", "cat /etc/llmkeep/pki/host.pem") != old
    estate.on("ops1", f"{COLLECT} && llmkeep audit findings")
    again = open_client(estate)
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
    within(240, "an answer", lambda: request(again, "POST", "/v1/chat/completions", body)[0] == 200)
