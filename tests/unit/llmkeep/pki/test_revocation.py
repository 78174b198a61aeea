"""Revocation: the record, the signed list, and what OpenSSL, nginx and stunnel make of it."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from revoked_hosts import Estate
from waiting import own_port, until

from llmkeep import durable
from llmkeep.pki import authority as pki
from llmkeep.pki import revocations, revoking
from llmkeep.pki.authority import PkiError

REFUSED = "certificate revoked"


@pytest.fixture
def estate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Estate:
    """An authority, and two hosts with a certificate each."""
    made = Estate(tmp_path, monkeypatch)
    for name in ("llm1", "train1"):
        made.certificate(name)
    return made


def current(estate: Estate) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl(estate.places.revocation_list.read_bytes())


def later(monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, _: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=days)

    monkeypatch.setattr(revoking, "datetime", Later)
    monkeypatch.setattr(revocations, "datetime", Later)


# ---------------------------------------------------------------- record and list
def test_a_revoked_certificate_is_refused_and_its_neighbours_is_not(estate: Estate) -> None:
    assert estate.verdict("train1") == "accepted"
    estate.revoke("train1")
    assert REFUSED in estate.verdict("train1")
    assert estate.verdict("llm1") == "accepted"


def test_all_certificates_of_a_name_are_revoked(estate: Estate) -> None:
    first = estate.certificate("train1").rename(estate.folder / "first.pem")
    estate.certificate("train1")
    estate.revoke("train1")
    assert first.exists()
    assert REFUSED in estate.verdict("first")
    assert REFUSED in estate.verdict("train1")


def test_revoking_twice_changes_nothing(estate: Estate) -> None:
    estate.revoke("train1")
    before = estate.places.revoked.read_bytes(), estate.places.revocation_list.read_bytes()
    estate.revoke("train1")
    assert (estate.places.revoked.read_bytes(), estate.places.revocation_list.read_bytes()) == before


def test_a_revoked_host_gets_no_certificate_until_it_is_reinstated_and_then_for_a_new_key_only(
    estate: Estate,
) -> None:
    key = estate.key("train1")
    estate.certificate("train1", key)
    estate.revoke("train1")
    with pytest.raises(PkiError, match="train1 is revoked since"):
        estate.certificate("train1")
    revoking.reinstate(estate.places, "train1", "found again", "ada")
    with pytest.raises(PkiError, match="the key of a revoked certificate"):
        estate.certificate("train1", key)
    old = (estate.folder / "train1.pem").rename(estate.folder / "old.pem")
    estate.certificate("train1")
    estate.publish()
    assert estate.verdict("train1") == "accepted"
    assert old.exists()
    assert REFUSED in estate.verdict("old")


def test_a_certificate_that_is_signed_while_its_host_is_revoked_is_not_handed_out(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def revoked_meanwhile(path: Path, entry: dict[str, object]) -> None:
        durable.record(path, entry)
        durable.record(estate.places.revoked, {"time": "2026-01-01T00:00:00+00:00", "action": "revoke", "name": "train1",
                                               "reason": "stolen", "serials": []})  # fmt: skip

    monkeypatch.setattr(pki, "record", revoked_meanwhile)
    with pytest.raises(PkiError, match="is revoked since"):
        estate.certificate("train1")


def test_refuses_a_name_that_never_had_a_certificate_and_an_empty_reason(estate: Estate) -> None:
    with pytest.raises(PkiError, match=r"there has never been a certificate for 'train9'.*llm1, train1"):
        revoking.revoke(estate.places, "train9", "stolen", "ada")
    with pytest.raises(PkiError, match="--reason is empty"):
        revoking.revoke(estate.places, "train1", " ", "ada")
    assert not estate.places.revoked.exists()


def test_the_list_names_who_is_revoked_for_the_firewalls(estate: Estate) -> None:
    estate.revoke("train1")
    assert estate.list.read_text().startswith("# revoked: train1\n-----BEGIN X509 CRL-----")
    revoking.reinstate(estate.places, "train1", "found again", "ada")
    estate.publish()
    assert "# revoked" not in estate.list.read_text()
    assert REFUSED in estate.verdict("train1")


def test_a_list_is_kept_for_a_week_and_then_renewed_long_before_it_expires(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = current(estate)
    assert first.next_update_utc
    assert first.next_update_utc - datetime.now(UTC) > timedelta(days=29)
    later(monkeypatch, 6)
    assert not revoking.publish(estate.places).signed
    later(monkeypatch, 8)
    assert revoking.publish(estate.places).signed
    assert revocations.number_of(current(estate)) > revocations.number_of(first)


def test_the_number_never_falls_though_the_clock_does(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = revocations.number_of(current(estate))
    later(monkeypatch, -1)
    estate.revoke("train1")
    assert revocations.number_of(current(estate)) == before + 1


def test_a_revocation_outlives_the_loss_of_its_record_and_ends_with_the_certificate(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate.revoke("train1")
    serial = x509.load_pem_x509_certificate((estate.folder / "train1.pem").read_bytes()).serial_number
    estate.places.revoked.unlink()
    later(monkeypatch, 29)
    estate.publish()
    assert current(estate).get_revoked_certificate_by_serial_number(serial)
    later(monkeypatch, 92)
    estate.publish()
    assert not current(estate).get_revoked_certificate_by_serial_number(serial)


def test_a_power_cut_between_record_and_list_is_made_good_by_the_next_call(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(revoking, "_publish", lambda _: pytest.fail("power cut"))
        with pytest.raises(pytest.fail.Exception):
            estate.revoke("train1")
    estate.publish()
    assert REFUSED in estate.verdict("train1")


def test_openssl_refuses_everyone_by_an_expired_list_and_without_one(estate: Estate) -> None:
    after = str(int((datetime.now(UTC) + timedelta(days=31)).timestamp()))
    assert "CRL has expired" in estate.verdict("llm1", "-attime", after)
    estate.list.write_bytes(estate.places.root_list.read_bytes())
    assert "unable to get certificate CRL" in estate.verdict("llm1")


def test_each_list_comes_with_a_certificate_that_is_refused_for_being_revoked(estate: Estate) -> None:
    probe = estate.folder / "probe.pem"
    probe.write_bytes(estate.places.revoked_probe.read_bytes())
    assert REFUSED in estate.verdict("probe")
    estate.places.revoked_probe.unlink()
    estate.publish()
    probe.write_bytes(estate.places.revoked_probe.read_bytes())
    assert REFUSED in estate.verdict("probe")


def test_an_authority_without_the_roots_list_says_how_to_get_one(estate: Estate) -> None:
    estate.places.root_list.unlink()
    with pytest.raises(PkiError, match="llmkeep issuing root-list"):
        revoking.publish(estate.places)


# ---------------------------------------------------------------- listeners
NGINX = """
user root; pid {folder}/nginx.pid; error_log {folder}/nginx.log info; worker_processes 1;
events {{ }}
http {{
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5; access_log off;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_protocols TLSv1.3; ssl_session_tickets off; ssl_session_cache off;
    ssl_certificate {folder}/llm1.pem; ssl_certificate_key {folder}/llm1.key;
    ssl_client_certificate {folder}/root.pem; ssl_verify_client on; ssl_verify_depth 3; ssl_crl {folder}/crl.pem;
    location / {{ return 200 ""; }}
  }}
}}
"""
STUNNEL = """
foreground = yes
pid =
syslog = no
[hsm]
accept = 127.0.0.1:{port}
exec = /usr/bin/head
execArgs = head -n 1
cert = {folder}/llm1.pem
key = {folder}/llm1.key
CAfile = {folder}/root.pem
CRLfile = {folder}/crl.pem
sslVersion = TLSv1.3
requireCert = yes
verifyChain = yes
"""


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def children(server: "subprocess.Popen[bytes]") -> set[str]:
    """nginx's workers; those from before a reload accept connections until the new ones are there."""
    return set(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())


@contextmanager
def served(argv: list[str], port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A server within the block, from when it listens."""
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: accepts(port))
        yield server
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize(("program", "welcome"), [("nginx", "200 OK"), ("stunnel", "GET / HTTP")])
def test_a_server_refuses_a_revoked_certificate_and_its_old_session_after_a_reload(
    estate: Estate, program: str, welcome: str
) -> None:
    port = own_port()
    text = (NGINX if program == "nginx" else STUNNEL).format(folder=estate.folder, port=port)
    conf = estate.folder / f"{program}.conf"
    conf.write_text(text)
    argv = ["nginx", "-c", str(conf), "-g", "daemon off;"] if program == "nginx" else ["stunnel4", str(conf)]
    session = str(estate.folder / "session.pem")
    with served(argv, port) as server:
        assert welcome in estate.handshake(port, "train1", "-sess_out", session)
        workers = children(server)
        estate.revoke("train1")
        server.send_signal(signal.SIGHUP)
        until(lambda: workers.isdisjoint(children(server)))
        until(lambda: welcome not in estate.handshake(port, "train1"))
        assert welcome not in estate.handshake(port, "train1", "-sess_in", session)
        assert welcome in estate.handshake(port, "llm1")


@pytest.mark.parametrize("program", ["nginx", "stunnel"])
def test_a_server_does_not_start_without_a_list(estate: Estate, program: str) -> None:
    conf = estate.folder / f"{program}.conf"
    conf.write_text((NGINX if program == "nginx" else STUNNEL).format(folder=estate.folder, port=own_port()))
    estate.list.unlink()
    argv = ["nginx", "-t", "-c", str(conf)] if program == "nginx" else ["stunnel4", str(conf)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "crl.pem" in done.stderr
