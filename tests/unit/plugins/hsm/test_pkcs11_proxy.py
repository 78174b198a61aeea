"""Debian's pkcs11-proxy: a way to an HSM by which volumes are enrolled and never open. Ours refuse it, and enrol nothing."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from luks_estate import PIN, SOFTHSM, Estate, luks
from plugin_modules import HELPERS, load
from waiting import own_port

hsm = load("module_utils.hsm.token_keys")
PROXY = "/usr/lib/libpkcs11-proxy.so.0"
INSIDE = """
mkdir -p /etc/pkcs11
mount --bind "$MODULES" /etc/pkcs11
exec "$@"
"""


@pytest.fixture
def estate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Estate:
    made = Estate(tmp_path / "estate")
    made.root.mkdir()
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.conf))
    made.make()
    return made


@pytest.fixture
def proxy(estate: Estate) -> Iterator[str]:
    """Its address: the daemon before SoftHSM, on loopback, without TLS (of which it knows 1.2 only)."""
    port = own_port()
    address = f"tcp://127.0.0.1:{port}"
    environment = os.environ | {"PKCS11_DAEMON_SOCKET": address}
    with (estate.root / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(["pkcs11-daemon", SOFTHSM], env=environment, stdout=log, stderr=log)
    try:
        ends = time.monotonic() + 10
        listens = ["ss", "-Hltn", f"sport = {port}"]
        while not subprocess.run(listens, capture_output=True, check=True).stdout:
            assert time.monotonic() < ends, (estate.root / "daemon.log").read_text()
            time.sleep(0.05)
        yield address
    finally:
        daemon.kill()
        daemon.wait()


def by_the_proxy(estate: Estate, proxy: str, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program where p11-kit has the proxy's client and no other module."""
    modules = estate.root / "pkcs11/modules"
    modules.mkdir(parents=True, exist_ok=True)
    client = estate.root / "client"
    client.write_text(f"#!/bin/sh\nPKCS11_PROXY_SOCKET={proxy} exec p11-kit remote {PROXY}\n")
    client.chmod(0o755)
    (modules / "llmkeep-hsm.module").write_text(f"remote: |{client}\n")
    for name in "opensc-pkcs11", "p11-kit-trust", "softhsm2":
        (modules / f"{name}.module").write_text("enable-in: no-program-at-all\n")
    return subprocess.run(
        ["unshare", "--mount", "bash", "-euc", INSIDE, "inside", *map(str, argv)],
        env=os.environ | {"MODULES": str(modules.parent), "PIN": PIN},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_systemd_enrols_by_it_and_opens_nothing(estate: Estate, proxy: str) -> None:
    """Otherwise what follows would prove nothing: the day this fails, Debian's proxy has learned to derive."""
    script = f"""
    cd {estate.root}
    (umask 077; printf boot > boot.key)
    cryptsetup luksFormat --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {estate.disk} boot.key
    systemd-cryptenroll --pkcs11-token-uri='{hsm.uri("main", "host1")}' --unlock-key-file=boot.key {estate.disk}
    echo it enrols
    printf %s "$PIN" | cryptsetup open --test-passphrase --token-only {estate.disk}
    """
    done = by_the_proxy(estate, proxy, "bash", "-euc", script)
    assert "it enrols" in done.stdout, done.stderr
    assert done.returncode != 0
    assert "CKM_ECDH1_DERIVE" in done.stderr


def test_the_key_is_refused_before_any_volume_is_enrolled(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKCS11_PROXY_SOCKET", proxy)
    settings = hsm.Settings(module=PROXY, tokens=["main", "spare"], label="host1", seconds=20)
    with pytest.raises(hsm.Fault) as told:
        hsm.look(settings, PIN.encode(), make=False, change=False)
    assert told.value.kind == "does_not_open"
    assert "CKR_" in str(told.value), "the module's own word for it"


def test_a_volume_is_refused_and_no_slot_stays(estate: Estate, proxy: str) -> None:
    program = HELPERS / "luks_estate.py"
    done = by_the_proxy(estate, proxy, sys.executable, program, estate.root, "{}")
    assert done.returncode != 0
    assert "enrols but does not open" in done.stderr, done.stderr
    assert "removed again" in done.stderr
    assert "CKM_ECDH1_DERIVE" in done.stderr
    assert estate.ways_in() == {"bootstrap"}
    assert len(luks.read(estate.disk).slots) == 1
