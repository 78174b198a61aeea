"""The way to the lab's HSM by the roles' own configuration: SoftHSM, p11-kit server, TLS both ways, systemd's enrolment."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from plugin_modules import ROOT
from revoked_hosts import Estate
from softhsm import SOFTHSM, Double, double, faulty, hsm
from waiting import PATIENCE, listens, own_port, until

CLIENT = "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so"


class Way:
    """SoftHSM on one side, a socket on the other; each process can be ended."""

    def __init__(self, lab: Double, estate: Estate) -> None:
        self.lab, self.folder, self.estate = lab, lab.folder, estate
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port = own_port()
        self.socket = self.folder / "client.sock"
        self.address = f"unix:path={self.socket}"

    def begin(self, name: str, argv: list[str], ready: Path | int) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(argv, stdout=log, stderr=log)
        ends = time.monotonic() + PATIENCE
        while not self.is_ready(ready):
            assert time.monotonic() < ends, (self.folder / f"{name}.log").read_text()
            assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()
            time.sleep(0.02)

    @staticmethod
    def is_ready(ready: Path | int) -> bool:
        if isinstance(ready, Path):
            return listens(ready)
        with socket.socket() as knock:
            return knock.connect_ex(("127.0.0.1", ready)) == 0

    def end(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def serve(self, module: str = SOFTHSM) -> None:
        """As softhsm-server.service does."""
        where = self.folder / "server.sock"
        where.unlink(missing_ok=True)
        tokens = ["pkcs11:token=llmkeep", "pkcs11:token=llmkeep-spare"]
        argv = ["p11-kit", "server", "--foreground", "--name", str(where), "--provider", module, *tokens]
        self.begin("server", argv, where)

    def door(self, role: str, template: str, host: str, ready: Path | int, **more: Any) -> None:
        """One of the two stunnels, by the template of its role, as `host`."""
        variables = {
            "ansible_host": "127.0.0.1",
            "hsm_port": self.port,
            "hsm_relay": "ops1",
            "hostvars": {"ops1": {"ansible_host": "127.0.0.1"}},
            **more,
        }
        text = (ROOT / "roles" / role / "templates" / template).read_text()
        shown = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(text)  # noqa: S701 no HTML
        path = self.folder / template.removesuffix(".j2")
        path.write_text(
            shown.render(variables)
            .replace("/etc/llmkeep/pki/host", str(self.folder / host))
            .replace("/etc/llmkeep/pki", str(self.folder))
        )
        self.begin(role, ["stunnel4", str(path)], ready)

    def let_in(self, *clients: str, host: str = "ops1") -> None:
        names = [f"{client}.estate.internal" for client in clients]
        self.door(
            "softhsm",
            "softhsm-tls.conf.j2",
            host,
            self.port,
            __softhsm_names=names,
            __softhsm_socket=self.folder / "server.sock",
        )

    def go(self, host: str) -> None:
        self.socket.unlink(missing_ok=True)
        self.door(
            "hsm",
            "hsm-tls.conf.j2",
            host,
            self.socket,
            __hsm_relay_name="ops1.estate.internal",
            __hsm_socket=self.socket,
        )

    def key(self, **more: Any) -> dict[str, Any]:
        """What hsm_key returns by the way."""
        words = {"module": CLIENT, "address": self.address, "state": "probed", "seconds": 10}
        return self.lab.key(**{**words, **more})

    def fault(self) -> Any:
        with pytest.raises(hsm.Fault) as told:
            self.key()
        return told.value

    def with_services_modules(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script where p11-kit has the role's modules and no others, as the services of a host do."""
        modules = self.folder / "pkcs11/modules"
        modules.mkdir(parents=True, exist_ok=True)
        (modules / "llmkeep-hsm.module").write_text(f"remote: {self.address}\n")
        for name in "opensc-pkcs11", "p11-kit-trust", "softhsm2":
            (modules / f"{name}.module").write_text("enable-in: no-program-at-all\n")
        inside = (
            f"mkdir -p /etc/pkcs11 && mount --bind {self.folder}/pkcs11 /etc/pkcs11 && cd {self.folder}\n"
        )
        return subprocess.run(
            ["unshare", "--mount", "bash", "-euc", inside + script],
            env={**os.environ, "PIN": (self.folder / "user-pin").read_text()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    lab = double(tmp_path, monkeypatch)
    lab.make_tokens()
    found = Way(lab, Estate(tmp_path, monkeypatch))
    for host in "ops1", "llm1", "train1":
        found.estate.certificate(host)
    yield found
    for name in list(found.processes):
        found.end(name)


@pytest.fixture
def open_way(way: Way) -> Way:
    """llm1 may come in, and does."""
    way.serve()
    way.let_in("llm1")
    way.go("llm1")
    return way


ENROL = """
truncate --size=32M volume
(umask 077; printf boot > boot.key)
cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 volume boot.key
systemd-cryptenroll --pkcs11-token-uri="$uri" --unlock-key-file=boot.key volume
"""
OPEN = 'printf %s "$PIN" | cryptsetup open --test-passphrase --token-only volume\n'


def test_a_key_is_made_beside_the_server_seen_by_the_way_and_opens_a_volume(open_way: Way) -> None:
    assert open_way.key()["missing"] == ["llmkeep", "llmkeep-spare"]
    made = open_way.lab.key(record=None)
    seen = open_way.key()
    assert [key["state"] for key in seen["key_pairs"]] == ["present", "present"]
    assert [key["public_sha256"] for key in seen["key_pairs"]] == [
        key["public_sha256"] for key in made["key_pairs"]
    ]
    assert all(key["double"] for key in seen["key_pairs"])
    done = open_way.with_services_modules(
        f"uri='{seen['key_pairs'][1]['uri']}'\n{ENROL}{OPEN}p11-kit list-modules"
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("module: ")] == [
        "module: llmkeep-hsm"
    ]
    pin = (open_way.folder / "user-pin").read_text()
    assert pin.encode() not in (open_way.folder / "volume").read_bytes()


def test_a_way_that_enrols_and_does_not_open_is_refused(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way.lab.key(record=None)
    monkeypatch.setenv("FAULTY_HSM_MODULE", SOFTHSM)
    monkeypatch.setenv("FAULTY_HSM_NO_DERIVE", "0x71")
    way.serve(faulty(tmp_path))
    way.let_in("llm1")
    way.go("llm1")
    done = way.with_services_modules(f"uri='{hsm.uri('llmkeep', 'llm1')}'\n{ENROL}echo it enrols\n{OPEN}")
    assert "it enrols" in done.stdout, done.stderr
    assert done.returncode != 0
    told = way.fault()
    assert told.kind == "does_not_open"
    assert "CKR_MECHANISM_PARAM_INVALID" in str(told)


def test_another_host_of_the_estate_is_not_let_in(way: Way) -> None:
    way.serve()
    way.let_in("llm1")
    way.go("train1")
    assert way.fault().kind == "absent"
    assert "Rejected by CERT at depth=0: CN=train1" in (way.folder / "softhsm.log").read_text()


def test_a_host_that_stands_in_for_the_hsm_is_not_spoken_to(way: Way) -> None:
    way.serve()
    way.let_in("llm1", host="train1")
    way.go("llm1")
    assert way.fault().kind == "absent"


def test_a_revoked_host_is_not_let_in_after_a_reload(open_way: Way) -> None:
    assert open_way.key()["missing"]
    open_way.estate.revoke("llm1")
    open_way.processes["softhsm"].send_signal(signal.SIGHUP)
    log = open_way.folder / "softhsm.log"
    until(lambda: log.read_text().count("Configuration successful") == 2)
    assert open_way.fault().kind == "absent"
    assert "certificate revoked" in log.read_text()


def test_a_revoked_hsm_is_not_spoken_to(way: Way) -> None:
    way.serve()
    way.let_in("llm1")
    way.estate.revoke("ops1")
    way.go("llm1")
    assert way.fault().kind == "absent"
    assert "certificate revoked" in (way.folder / "hsm.log").read_text()


def test_an_hsm_that_ends_is_absent_in_bounded_time_and_is_found_again(open_way: Way) -> None:
    open_way.lab.key(record=None)
    assert not open_way.key()["missing"]
    for name in "server", "softhsm":
        open_way.end(name)
        begun = time.monotonic()
        assert open_way.fault().kind == "absent"
        assert time.monotonic() - begun < PATIENCE
        if name == "server":
            open_way.serve()
        else:
            open_way.let_in("llm1")
        assert not open_way.key()["missing"]


def test_an_hsm_that_is_killed_in_the_middle_of_a_login_is_absent_at_once(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way.lab.key(record=None)
    monkeypatch.setenv("FAULTY_HSM_MODULE", SOFTHSM)
    monkeypatch.setenv("FAULTY_HSM_LOGINS", str(tmp_path / "logins"))
    monkeypatch.setenv("FAULTY_HSM_SLOW", "60")
    way.serve(faulty(tmp_path))
    way.let_in("llm1")
    way.go("llm1")

    until = f"until [ -e {tmp_path}/logins ]; do sleep 0.02; done; kill -KILL {way.processes['softhsm'].pid}"
    killer = subprocess.Popen(["sh", "-c", until])
    begun = time.monotonic()
    told = way.fault()
    killer.wait()
    assert time.monotonic() - begun < PATIENCE
    assert told.kind == "absent"
    assert (tmp_path / "logins").read_text() == "login\n"


LOGIN = f"""
import sys
sys.path.insert(0, "{ROOT}/plugins/module_utils/hsm")
import pkcs11
module = pkcs11.Module("{SOFTHSM}")
slot = next(token.slot for token in module.tokens() if token.label == "llmkeep")
print("ready", flush=True)
while True:
    with module.session(slot) as session:
        session.login(sys.argv[1].encode())
"""


def test_a_killed_login_leaves_tokens_whole_that_are_served_read_only(way: Way) -> None:
    """The mount that softhsm-server.service has. Where SoftHSM can write, about one kill in ten empties a token."""
    way.lab.key()
    before = {path: path.read_bytes() for path in (way.folder / "tokens").rglob("*.object")}
    (way.folder / "login.py").write_text(LOGIN)
    tokens = way.folder / "tokens"
    inside = f"mount --bind {tokens} {tokens} && mount -o remount,bind,ro {tokens} && exec "
    pin = (way.folder / "user-pin").read_text()
    for moment in range(15):
        inner = f"{inside}{sys.executable} {way.folder}/login.py {pin}"
        process = subprocess.Popen(["unshare", "--mount", "bash", "-c", inner], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.003 * moment)
        process.kill()
        process.communicate()
    assert {path: path.read_bytes() for path in tokens.rglob("*.object")} == before
    assert not way.lab.key()["missing"]
