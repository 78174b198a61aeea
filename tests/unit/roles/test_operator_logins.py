"""Logins of operators at Debian's sshd, as roles base and operators configure it, with a stand-in for a token."""

import getpass
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from plugin_modules import ROOT
from rendered_role import rendered
from token_agent import PRESENT, VERIFIED, TokenAgent
from waiting import own_port, until

SSHD = "/usr/sbin/sshd"
USER = getpass.getuser()
OPERATOR = {"name": "alice", "keys": ["PUBLIC"]}


class Server(NamedTuple):
    """An sshd on loopback, the folder of its keys, and the key of a client without a token."""

    folder: Path
    port: int
    plain: Path

    def login(self, *options: str) -> subprocess.CompletedProcess[str]:
        own = (
            "BatchMode=yes",
            f"UserKnownHostsFile={self.folder}/known",
            "PreferredAuthentications=publickey",
        )
        words = [word for option in (*own, *options) for word in ("-o", option)]
        return subprocess.run(
            ["ssh", "-F", "none", *words, "-p", str(self.port), f"{USER}@127.0.0.1", "echo", "in"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def log(self) -> str:
        return (self.folder / "log").read_text()


def configuration(folder: Path, **variables: object) -> str:
    """Role base's file with role operators' in the place of its Include, for the user of this test as the operator."""
    values = {"operators_accounts": [OPERATOR], "base_ssh_users": [USER]} | variables
    (folder / "role").mkdir()
    expressions = {
        "base": f"lookup('ansible.builtin.template', '{ROOT}/roles/base/templates/sshd_config.j2')",
        "operators": "lookup('ansible.builtin.template', 'sshd.conf.j2')",
    }
    made = rendered(
        folder / "role", "operators", expressions, "llm1", {"llm1.estate.internal": "10.0.0.1"}, values
    )
    own = made["operators"].replace("/etc/ssh/operators/%u", f"{folder}/operators/%u")
    own = own.replace("Match Group llm-operators", f"Match User {USER}")
    (folder / "llmkeep-operators.conf").write_text(own)
    include = "/etc/ssh/sshd_config.d/llmkeep-*.conf"
    assert include in made["base"]
    text = made["base"].replace(include, f"{folder}/llmkeep-*.conf")
    # Without root there is no PAM, and others than root may write the folder of a test. The first value of an option counts.
    text = text.replace("UsePAM yes", "UsePAM no").replace("/etc/ssh/ssh_host_ed25519_key", f"{folder}/host")
    return f"StrictModes no\nPerSourcePenalties no\n{text}"


def started(folder: Path, **variables: object) -> Iterator[Server]:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "plain"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "operators").mkdir()
    port = own_port()
    known = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {known}")
    (folder / "config").write_text(configuration(folder, **variables))
    argv = [
        SSHD,
        "-D",
        "-f",
        folder / "config",
        "-p",
        str(port),
        "-o",
        "ListenAddress=127.0.0.1",
        "-E",
        folder / "log",
    ]
    process = subprocess.Popen([str(word) for word in argv])
    try:
        until(lambda: (folder / "log").exists() and "Server listening" in (folder / "log").read_text())
        yield Server(folder, port, folder / "plain")
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from started(tmp_path_factory.mktemp("sshd"))


def declared(server: Server, *keys: str) -> None:
    (server.folder / "operators" / USER).write_text("".join(f"{key}\n" for key in keys))


def by_token(server: Server, folder: Path, flags: int) -> subprocess.CompletedProcess[str]:
    with TokenAgent(folder / "agent", flags) as agent:
        declared(server, agent.public)
        return server.login(f"IdentityAgent={agent.socket}")


def test_an_operator_logs_in_by_a_token_that_verified_its_holder(server: Server, tmp_path: Path) -> None:
    done = by_token(server, tmp_path, PRESENT | VERIFIED)
    assert (done.returncode, done.stdout) == (0, "in\n"), server.log()


@pytest.mark.parametrize(
    ("flags", "lacking"),
    [(PRESENT, "user verification"), (VERIFIED, "user presence (authenticator touch)")],
    ids=["touched alone", "verified alone"],
)
def test_a_token_that_was_not_both_touched_and_verified_is_refused(
    server: Server, tmp_path: Path, flags: int, lacking: str
) -> None:
    before = len(server.log())
    done = by_token(server, tmp_path, flags)
    assert (done.returncode, done.stdout) == (255, "")
    assert f"rejected: {lacking} requirement not met" in server.log()[before:]


def test_an_undeclared_token_is_refused(server: Server, tmp_path: Path) -> None:
    with (
        TokenAgent(tmp_path / "other", PRESENT | VERIFIED) as other,
        TokenAgent(tmp_path / "agent", 5) as agent,
    ):
        declared(server, other.public)
        assert server.login(f"IdentityAgent={agent.socket}").returncode == 255


def test_a_plain_key_is_refused_though_the_operators_file_has_it(server: Server) -> None:
    declared(server, server.plain.with_suffix(".pub").read_text().strip())
    done = server.login(f"IdentityFile={server.plain}", "IdentityAgent=none")
    assert (done.returncode, done.stdout) == (255, "")
    assert "signature algorithm ssh-ed25519 not in PubkeyAcceptedAlgorithms" in server.log()


def test_a_plain_key_is_taken_where_the_inventory_allows_them(tmp_path: Path) -> None:
    for server in started(tmp_path, operators_plain_keys_allowed=True):
        declared(server, server.plain.with_suffix(".pub").read_text().strip())
        done = server.login(f"IdentityFile={server.plain}", "IdentityAgent=none")
        assert (done.returncode, done.stdout) == (0, "in\n"), server.log()
