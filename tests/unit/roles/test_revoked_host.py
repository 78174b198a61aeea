"""The firewall of a host towards a revoked one: role base's rules with the part of host_revocations, and real packets."""

import json
import subprocess
import sys
from pathlib import Path

from plugin_modules import ROOT, load
from rendered_role import rendered

module = load("modules.host_revocations")
HOSTS = {
    "ops1.estate.internal": "10.0.0.11",
    "llm1.estate.internal": "10.0.0.21",
    "train1.estate.internal": "10.0.0.22",
}
# In a namespace whose loopback has both addresses. Prints what a server on llm1 and SSH to train1 see, before and after.
PACKETS = """
import json, socket, subprocess, sys

def passes(stream, other):
    stream.settimeout(0.5), other.settimeout(0.5)
    try:
        stream.sendall(b"x")
        return other.recv(1) == b"x"
    except TimeoutError:
        return False

def joined(server, source):
    try:
        return socket.create_connection(server.getsockname(), 0.5, (source, 0)), server.accept()[0]
    except TimeoutError:
        return None

llm1, ssh = socket.create_server(("10.0.0.21", 9000)), socket.create_server(("10.0.0.22", 22))
standing = joined(llm1, "10.0.0.22")
seen = [passes(*standing)]
subprocess.run(["nft", "--file", "-"], input=sys.argv[1], text=True, check=True)
seen += [passes(*standing), bool(joined(llm1, "10.0.0.22")), bool(joined(llm1, "10.0.0.11"))]
to_revoked = joined(ssh, "10.0.0.21")
seen.append(bool(to_revoked) and passes(*reversed(to_revoked)))
print(json.dumps(seen))
"""


def firewall(folder: Path, revoked: list[str]) -> str:
    """All rules of llm1: role base's, with a service that is open to all."""
    rules = {"rules": "lookup('ansible.builtin.template', 'nftables.conf.j2')"}
    groups = {"control": ["ops1"], "mirror": ["ops1"]}
    given = {"role_path": str(ROOT / "roles/base")}
    text: str = rendered(folder, "base", rules, "llm1", HOSTS, given, groups)["rules"]
    for name in ("refuse-input", "refuse-output", "input", "output"):
        added = {"refuse-input": module.rules(revoked), "input": "tcp dport 9000 accept\n"}.get(name, "")
        text = text.replace(f'include "/etc/nftables.d/{name}-*.nft"', added)
    return text


def test_a_revoked_host_loses_its_standing_connections_and_only_ssh_to_it_is_answered(tmp_path: Path) -> None:
    up = 'ip link set lo up && for n in 11 21 22; do ip address add 10.0.0.$n/32 dev lo; done && nft --file - && exec "$@"'
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    after = firewall(tmp_path / "after", ["10.0.0.22"])
    argv = ["unshare", "--net", "sh", "-c", up, "sh", sys.executable, "-c", PACKETS, after]
    before = firewall(tmp_path / "before", [])
    done = subprocess.run(argv, input=before, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    standing, cut, again, neighbour, ssh = json.loads(done.stdout)
    assert (standing, cut, again, neighbour, ssh) == (True, False, False, True, True)
