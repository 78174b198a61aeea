"""The whole estate on kernels of its own, with encrypted volumes: what a container cannot show."""

import json
import time
from typing import Any

import pytest
from estate import HOSTS, ROOT, Client, Lab, answered, changed, drill, leaks, request, verify, within


@pytest.fixture(scope="module")
def second_run(estate: Lab) -> str:
    """What a run of the roles that know volumes says over the finished estate, as loud as Ansible can be."""
    return estate.site("-D", "-vvvv", "--tags hsm,luks,opa,llm_serving,audit")


def test_a_second_run_changes_nothing_on_volumes_either(second_run: str) -> None:
    assert changed(second_run) == {"ops1": 0, "llm1": 0}


def test_the_pin_of_the_volumes_is_in_no_output_and_no_log(
    estate: Lab, client: Client, second_run: str
) -> None:
    assert not leaks(estate, client, [("llm1", "cryptsetup.pkcs11-pin")], second_run)


def test_a_folder_on_a_volume_is_told_from_one_that_is_on_the_hosts_own_disk(estate: Lab) -> None:
    """What role llm_training asks before it trains, and its scenario has a stand-in for."""
    script = (ROOT / "roles/llm_training/files/block-device-types.sh").read_text()
    training, moved, types = "/srv/llmkeep/training", "/var/lib/moved", "/run/block-device-types.sh"
    asked = f"""cat > {types} && mkdir {training} {moved} && sh {types} {training} &&
    mount --bind {moved} {training} && sh {types} {training} &&
    umount {training} && rmdir {training} {moved} && rm {types}"""
    on_the_volume, on_the_disk = estate.on("llm1", asked, given=script).splitlines()
    assert "crypt" in on_the_volume.split()
    assert "crypt" not in on_the_disk.split()


# What no service may do, though it were root: a line for each, by a profile that lets Python run.
ATTEMPTS = r"""
for attempt in "open('/etc/shadow')" "open('/root/x', 'w')" "import os; os.execv('/bin/sh', ['sh', '-c', 'echo shell'])" \
  "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"
do
  aa-exec --profile={profile} -- /usr/bin/python3 -c "$attempt" 2>&1 |
    grep --only-matching --max-count=1 PermissionError || echo "$attempt"
done
"""


def test_services_are_confined_even_as_root(estate: Lab, client: Client) -> None:
    answered(client, "/generate", {"prompt": "Name a colour.", "max_tokens": 2}, 60)
    for unit, profile in (
        ("llm-gateway@1", "llmkeep-gateway"),
        ("llm-engine@smollm2-135m-instruct", "llmkeep-engine"),
        ("llm-audit", "llmkeep-record"),
        ("opa", "llmkeep-opa"),
    ):
        label = f"cat /proc/$(systemctl show -P MainPID {unit})/attr/current"
        assert estate.on("llm1", label).strip() == f"{profile} (enforce)"
        assert estate.on("llm1", ATTEMPTS.format(profile=profile)).split() == ["PermissionError"] * 4
    for unit in ("nginx", "redis-server"):
        assert "(enforce)" in estate.on("llm1", f"cat /proc/$(systemctl show -P MainPID {unit})/attr/current")


# The same in the profile that lets bash run.
BASH_ATTEMPTS = r"""
for attempt in "read -r line < /etc/shadow" "true > /root/x" "sh -c true" "python3 -c 0"
do
  aa-exec --profile=llmkeep-elasticsearch -- /bin/bash -c "$attempt" 2>&1 |
    grep --quiet "^/bin/bash: line 1: .*: Permission denied$" && echo refused || echo "$attempt"
done
"""


def test_the_profiles_of_units_that_run_elsewhere_confine_even_root(estate: Lab) -> None:
    assert estate.on("llm1", ATTEMPTS.format(profile="llmkeep-documents")).split() == ["PermissionError"] * 4
    assert estate.on("llm1", BASH_ATTEMPTS).splitlines() == ["refused"] * 4


def test_an_audited_change_is_in_the_journal_with_the_key_of_its_rule(estate: Lab) -> None:
    asked = (
        "touch /etc/hosts; journalctl --boot _TRANSPORT=audit _EXE=/usr/bin/touch --output=cat --since=-1min"
    )
    within(20, "the event", lambda: 'key="system-locale"' in estate.on("llm1", asked))


def test_an_operator_restarts_a_unit_that_is_named_and_no_other(estate: Lab) -> None:
    restart = "sudo --non-interactive systemctl --no-ask-password --no-pager restart {}.service; echo code $?"
    as_alice = "runuser -u alice -- script --quiet --return --command '{}' /dev/null < /dev/null"
    before = estate.on("llm1", "systemctl show -P MainPID opa redis-server").split()
    for unit, ending in (("opa", "0"), ("redis-server", "1")):
        output = estate.on("llm1", as_alice.format(restart.format(unit)))
        assert output.rpartition("code ")[2].strip() == ending, output
    after = estate.on("llm1", "systemctl show -P MainPID opa redis-server").split()
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert "alice" in estate.on("llm1", "sudoreplay --directory /var/log/sudo-io --list")


def test_a_session_of_an_operator_comes_to_be_on_the_control_nodes_record(estate: Lab) -> None:
    status = "sudo --non-interactive systemctl --no-ask-password --no-pager --full status opa.service"
    estate.on("llm1", f"runuser -u alice -- script --quiet --command '{status}' /dev/null < /dev/null")
    estate.on("llm1", "systemctl start llmkeep-sudo-output.service")
    digest = "cd /var/log/sudo-io/{} && LC_ALL=C sha256sum -- * | sha256sum"
    # A look that the timer had begun is waited for, and may have been too early.
    look = "systemctl start llmkeep-audit-witness.service; llmkeep audit show --subject alice --json || true"

    def sessions() -> list[dict[str, Any]]:
        return [json.loads(line) for line in estate.on("ops1", look).splitlines()]

    within(60, "the session", lambda: any(each["process.args"][-2] == "status" for each in sessions()))
    (event,) = [each for each in sessions() if each["process.args"][-2] == "status"]
    assert (event["host.name"], event["process.executable"]) == ("llm1", "/usr/bin/systemctl")
    assert (event["process.exit_code"], event["event.outcome"]) == (0, "success")
    assert (
        estate.on("llm1", digest.format(event["llmkeep.session.id"])).split()[0]
        == event["llmkeep.session.sha256"]
    )
    assert estate.on("ops1", "llmkeep audit verify; echo code $?").split()[-1] == "0"


def test_a_session_that_runs_is_listed_once_its_sudo_is_gone(estate: Lab) -> None:
    follow = "sudo --non-interactive journalctl --no-pager --unit=opa.service --follow"
    estate.on("llm1", f"systemd-run --unit=follow runuser -u alice -- script --command '{follow}' /dev/null")
    within(20, "the session", lambda: "--follow" in estate.on("llm1", "cat /var/log/sudo-io/alice-*/log"))
    ledger = "systemctl start llmkeep-sudo-output.service; cat /var/lib/llmkeep-sudo-output/ledger"
    assert "--follow" not in estate.on("llm1", ledger)
    estate.on("llm1", "systemctl kill --signal=KILL follow; systemctl stop follow")
    last = json.loads(estate.on("llm1", ledger).splitlines()[-1])
    assert (last["arguments"][-1], last["interrupted"], last["exit"]) == ("--follow", True, None)


MODELS = "/srv/llmkeep/models"


def test_installed_weights_are_verified_within_a_second(estate: Lab) -> None:
    program = (ROOT / "plugins/module_utils/bundle/verity.py").read_text()
    command = f"python3 - {MODELS} false{' smollm2-135m-instruct' * 3}"
    said = estate.on("llm1", f"date +%s.%N && {command} && date +%s.%N", given=program).splitlines()
    assert [line.partition(": ")[2] for line in said[1:-1]] == [
        "5 files kernel-verified (fs-verity), 0 hashed"
    ] * 3
    assert float(said[-1]) - float(said[0]) < 1


def test_an_engine_ends_at_a_flipped_byte_of_its_weights_instead_of_answering(
    estate: Lab, client: Client
) -> None:
    weights, unit = f"{MODELS}/smollm2-135m-instruct/model.safetensors", "llm-engine@smollm2-135m-instruct"
    disk = (ROOT / "tests/lab/kernels/altered_disk.py").read_text()
    log, begin = (
        f"journalctl --unit {unit} --output=cat --after-cursor='{{}}'",
        "journalctl --lines=0 --show-cursor",
    )
    cursor = estate.on("llm1", begin).partition("cursor: ")[2].strip()
    flip = f"python3 - flip {weights} {100 << 20}"  # in layer 14, which each token needs
    sums = [{"prompt": f"What is 2 and {number}?", "max_tokens": 8} for number in range(3)]
    answered(client, "/generate", sums[0], 60)
    estate.on("llm1", flip, given=disk)
    try:
        # What the engine has in memory was read before, and would be given to other readers, too.
        estate.on("llm1", f"python3 - page-out {weights} $(systemctl show -P MainPID {unit})", given=disk)
        assert "Input/output error" in estate.on("llm1", f"cat {weights} 2>&1 > /dev/null; true")
        status, said = request(client, "POST", "/generate", sums[1])
        assert status == 503, said
        refused = f"cannot read {weights}: Input/output error; its disk is damaged"
        within(60, "it refuses to start", lambda: refused in estate.on("llm1", log.format(cursor)))
        assert "status=7/BUS" in estate.on("llm1", log.format(cursor))
    finally:
        estate.on("llm1", flip, given=disk)
    answered(client, "/generate", sums[2], 240)


def renewed_since(lab: Lab, moment: int, seconds: float = 240) -> None:
    """Wait until the control node's renewal ended with success after a moment of the hosts' clocks."""
    ended = 'date +%s -d "$(systemctl show -P ExecMainExitTimestamp llmkeep-pki-renew.service)"'
    end = time.monotonic() + seconds
    while int(lab.on("ops1", ended, check=False).strip() or 0) < moment:
        if time.monotonic() > end:
            pytest.fail(
                f"no renewal for {seconds:.0f} s:\n" + lab.on("ops1", "systemctl status '*renew*'; true")
            )
        time.sleep(2)
    if lab.on("ops1", "systemctl show -P Result llmkeep-pki-renew.service").strip() != "success":
        pytest.fail(lab.on("ops1", "journalctl --unit llmkeep-pki-renew.service --lines 60 --no-pager"))


@pytest.mark.moves_clocks
@pytest.mark.usefixtures("client")
def test_certificates_are_renewed_unattended_until_day_100(estate: Lab) -> None:
    """Ansible is not run: the clocks move on in steps, and the timer on the control node does the rest."""
    serial = "openssl x509 -in /etc/llmkeep/pki/host.pem -noout -serial"
    before = {host: estate.on(host, serial) for host in HOSTS}
    for _ in range(4):  # each less than the 30 days before its end in which a certificate is renewed
        now = int(estate.on("ops1", "date +%s")) + 25 * 86400
        for host in HOSTS:
            estate.on(host, f"date --set=@{now} > /dev/null")
        renewed_since(estate, now)
    after = {host: estate.on(host, serial) for host in HOSTS}
    assert all(before[host] != after[host] for host in HOSTS)
    for host in HOSTS:  # its timer starts it within a quarter of an hour
        estate.on(host, "systemctl start llmkeep-integrity.service")
    # Among the checks: is the certificate that is served the one on disk? What a person owes by then, and nothing else, is due.
    # And a limit that only this kernel applies to a unit, which is taken away.
    limit = "systemctl set-property --runtime llm-engine@smollm2-135m-instruct.service MemoryMax="
    estate.on("llm1", f"{limit}infinity")
    _, broken = verify(estate)
    assert set(broken) == {"luks.recovery_key_was_drilled", "llm_serving.memory_is_bounded"}, broken
    estate.on("llm1", f"{limit}1G")
    for volume in ("data", "audit"):
        drill(estate, f"llm1/{volume}")
    report, broken = verify(estate, "--tags", "luks,llm_serving")  # all others have held
    assert (report["ok"], broken) == (True, {})
