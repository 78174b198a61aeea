"""The whole estate on kernels of its own, with encrypted volumes: what a container cannot show."""

import os
import random
import time

import pytest
from estate import HOSTS, Client, Lab, answers, changed, drill, leaks, verify


def test_the_model_answers_from_encrypted_volumes(client: Client) -> None:
    assert "Paris" in answers(client)


@pytest.fixture(scope="module")
def second_run(estate: Lab) -> str:
    """What a run over the finished estate says, as loud as Ansible can be."""
    return estate.site("-D", "-vvvv")


def test_a_second_run_changes_nothing_on_volumes_either(second_run: str) -> None:
    assert changed(second_run) == {"ops1": 0, "llm1": 0}


def test_the_pin_of_the_volumes_is_in_no_output_and_no_log(
    estate: Lab, client: Client, second_run: str
) -> None:
    assert not leaks(estate, client, [("llm1", "cryptsetup.pkcs11-pin")], second_run)


# One cut a host in the suite; `make storm` sets how many, each at a moment of its own.
CUTS = [(host, 15.0) for host in HOSTS[::-1]]
CUTS += [
    (host, random.Random(f"{host} {number}").uniform(2, 90))  # noqa: S311 - moments, no secrets
    for number in range(int(os.environ.get("STORM", "0")))
    for host in HOSTS[::-1]
]


@pytest.mark.parametrize(("host", "seconds"), CUTS)
def test_a_power_cut_during_site_converges_at_the_next_run(
    estate: Lab, client: Client, host: str, seconds: float
) -> None:
    broken = "/opt/llmkeep/current /etc/nginx/conf.d/llmkeep-edge.conf /etc/redis/redis.conf"
    estate.on("llm1", f"rm -rf {broken}")
    estate.on("ops1", f"systemd-run --quiet --collect --unit=site --setenv=HOME=/root {estate.site_command}")
    time.sleep(seconds)
    estate.run("power-off", host)
    estate.run("power-on", host)
    estate.on("ops1", "systemctl stop site.service", check=False)
    estate.site()
    assert "Paris" in answers(client)


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
    assert lab.on("ops1", "systemctl show -P Result llmkeep-pki-renew.service").strip() == "success"


@pytest.mark.moves_clocks
@pytest.mark.usefixtures("client")
def test_certificates_are_renewed_unattended_until_day_100(estate: Lab) -> None:
    """Ansible is not run: the clocks move on in steps, and the timer on the control node does the rest."""
    serial = "openssl x509 -in /etc/llmkeep/pki/host.pem -noout -serial"
    before = {host: estate.on(host, serial) for host in HOSTS}
    for _ in range(5):
        now = int(estate.on("ops1", "date +%s")) + 20 * 86400
        for host in HOSTS:
            estate.on(host, f"date --set=@{now} > /dev/null")
        renewed_since(estate, now)
    after = {host: estate.on(host, serial) for host in HOSTS}
    assert all(before[host] != after[host] for host in HOSTS)
    # Among the checks: is the certificate that is served the one on disk? What a person owes by then, and nothing else, is due.
    _, broken = verify(estate)
    assert list(broken) == ["luks.recovery_key_was_drilled"], broken
    for volume in ("data", "audit"):
        drill(estate, f"llm1/{volume}")
    report, broken = verify(estate)
    assert (report["ok"], broken) == (True, {})
