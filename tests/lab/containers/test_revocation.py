"""The certificate and key of a host were stolen: revoked by one command, refused by every listener that asks for one."""

import json
import time
from collections.abc import Iterator

import pytest
from estate import Lab

PKI = "/etc/llmkeep/pki"
HSM, MIRROR = "10.77.0.11:5696", "10.77.0.11:8443"
# A client that is let in is held open, so it is ended; one that is refused says why.
HANDSHAKE = (
    "timeout 3 openssl s_client -connect {at} -CAfile {pki}/root.pem -tls1_3 -quiet {shown} 2>&1; true"
)
SHOWN = "-cert {of}.pem -key {of}.key -cert_chain {of}.pem"
VERIFIED = (
    "timeout 3 openssl s_client -connect {at} -CAfile {pki}/root.pem -brief < /dev/null 2>&1 "
    "| grep -c 'Verification: OK'; true"
)
ASKED_AGAIN = (
    "openssl req -new -key /run/stolen.key -subj /CN=llm1 -addext subjectAltName=DNS:llm1.estate.internal "
    "| llmkeep pki sign --csr - --names llm1.estate.internal --host llm1 2>&1"
)
# TCP ports that other hosts reach, but SSH's, which takes no certificate.
PORTS = "ss -Htln | awk '{print $4}' | grep -v -e '^127\\.' -e '^\\[::1\\]' | sed 's/.*://' | sort -n | uniq | grep -vx 22"


def shown(lab: Lab, of: str) -> str:
    """What the HSM's door says to a certificate, shown from an address that its firewall lets in."""
    return lab.on("ops1", HANDSHAKE.format(at=HSM, pki=PKI, shown=SHOWN.format(of=of)))


@pytest.fixture(scope="module")
def estate_with_hsm(floor_again: Lab) -> Iterator[Lab]:
    """The floor and the only service of it that asks for certificates; /run/stolen.* on ops1 are copies of llm1's."""
    floor_again.site("--tags", "softhsm")
    for kind in ("pem", "key"):
        text = floor_again.on("llm1", f"cat {PKI}/host.{kind}")
        floor_again.on("ops1", f"umask 077; cat > /run/stolen.{kind}", given=text)
    yield floor_again
    for host in ("ops1", "llm1"):
        floor_again.run("restore", host, "floor")


def test_a_stolen_certificate_is_refused_within_a_minute_and_its_host_gets_another_one(
    estate_with_hsm: Lab,
) -> None:
    lab = estate_with_hsm
    assert "alert" not in shown(lab, "/run/stolen")
    reaches = VERIFIED.format(at=MIRROR, pki=PKI)
    assert lab.on("llm1", reaches).strip() == "1"

    began = time.monotonic()
    lab.on("ops1", "llmkeep pki revoke llm1 --reason 'stolen in the lab'")
    assert time.monotonic() - began < 60
    assert "alert certificate revoked" in shown(lab, "/run/stolen")
    assert lab.on("llm1", reaches).strip() == "0"
    assert lab.on("ops1", PORTS).split() == ["5696", "8443"], "a listener that this test does not know"

    assert "llm1 is revoked since" in lab.on("ops1", ASKED_AGAIN, check=False)
    record = json.loads(lab.on("ops1", "llmkeep audit show --json | grep 'pki revoke llm1' | head -n 1"))
    assert (record["event.action"], record["event.reason"]) == ("pki revoke llm1", "stolen in the lab")

    lab.on("ops1", "llmkeep pki reinstate llm1 --reason 'found again'")
    lab.site("--tags", "pki")
    assert lab.on("llm1", reaches).strip() == "1"
    assert "alert certificate revoked" in shown(lab, "/run/stolen")
    for kind in ("pem", "key"):
        lab.on("ops1", f"umask 077; cat > /run/new.{kind}", given=lab.on("llm1", f"cat {PKI}/host.{kind}"))
    assert "alert" not in shown(lab, "/run/new")
    assert lab.on("ops1", "cmp -s /run/new.key /run/stolen.key; echo $?").strip() == "1"
