"""`inventory/example` in check mode, on stand-ins of its hosts: bare containers without GPU, HSM and disks.

llm1 and gpu1 have the Python of Debian's standard system, llm2 and gpu2 have none. The file that roles look for stands in for
NVIDIA's driver, and some digits for the HSM's PIN. The bundle is the lab's, which has neither vLLM nor the example's models.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from estate import Lab, changed

STAND_INS = Path(__file__).with_name("example_hosts")
WITH_PYTHON, BARE = ("llm1", "gpu1"), ("llm2", "gpu2")
BOOTSTRAP = """
sh /run/lab/stick/bootstrap estate.internal
install -d -m 0700 /etc/credstore.encrypted
printf 123456 | systemd-creds encrypt --name=llmkeep.hsm-pin - /etc/credstore.encrypted/llmkeep.hsm-pin
"""
PYTHON = """
echo 'deb [signed-by=/run/lab/stick/keyring.pgp] file:/run/lab/stick/apt trixie main' > /run/stick.list
apt="apt-get -qq -y -o Dir::Etc::sourcelist=/run/stick.list -o Dir::Etc::sourceparts=/dev/null"
export DEBIAN_FRONTEND=noninteractive
$apt update && $apt install --no-install-recommends python3 python3-apt
"""
DRIVER = """
mount -t tmpfs tmpfs /proc/driver && mkdir /proc/driver/nvidia
echo 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06' > /proc/driver/nvidia/version
"""
# Times of change, which no writer can set back. What is left out: logs, apt's cache, and the sockets of SSH and of Ansible.
LISTING = """
find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /dev -o -path /tmp -o -path /var/log \\
    -o -path /var/cache/apt -o -path "$HOME/.ansible" \\) -prune -o -printf '%p %y %m %U:%G %s %T@ %C@ %l\\n'
systemctl list-units --all --no-legend --plain --no-pager --type=service,timer,mount --state=active
"""


@pytest.fixture
def stand_ins() -> Iterator[Lab]:
    lab = Lab("example")
    try:
        lab.run("--inventory", str(STAND_INS), "up")
        for host in ("ops1", *WITH_PYTHON):
            lab.run("plug", host, ".lab/bundle")
        given = {"ops1": BOOTSTRAP, "llm1": PYTHON + DRIVER, "gpu1": PYTHON + DRIVER}
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(lambda host: lab.on(host, f"set -e{given[host]}"), given))
        yield lab
    finally:
        lab.run("destroy")


def listed(lab: Lab) -> dict[str, set[str]]:
    """Each file of each host with its attributes, and the units that run there."""
    return {host: set(lab.on(host, LISTING).splitlines()) for host in ("ops1", *WITH_PYTHON, *BARE)}


def test_the_example_is_previewed_on_bare_hosts_and_nothing_changes(stand_ins: Lab) -> None:
    checked = stand_ins.on("ops1", "llmkeep inventory check -i inventory/example")
    assert "no fault found" in checked
    before = listed(stand_ins)
    # Python's bytecode of the tree is no change of the control node.
    said = stand_ins.on("ops1", "PYTHONDONTWRITEBYTECODE=1 llmkeep site --check --diff -i inventory/example")
    after = listed(stand_ins)
    assert {host: sorted(before[host] ^ after[host]) for host in before if before[host] != after[host]} == {}
    assert {host for host, count in changed(said).items() if count} == {"ops1", *WITH_PYTHON}
    plain = " ".join(said.split())
    assert "of what the lock of this tree wants: pkg:pypi/" in plain
    assert (
        "ops1, the control node, lacks releases/coder, releases/deepseek-v2.5, which the inventory's models need"
        in plain
    )
    assert "the mirror was not asked, since /etc/llmkeep/pki/root.pem, /etc/apt/keyrings/llmkeep.pgp" in plain
    for host in BARE:
        assert f"{host} has no Python, so no module runs there" in plain
    # From the first role of a host to the last one.
    for line in (
        "AuthenticationMethods publickey",
        "vllm@.service",
        "/etc/nginx/conf.d/llmkeep-edge.conf",
        "llm-train@.service",
    ):
        assert line in said
