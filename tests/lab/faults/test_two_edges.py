"""Two edges with one address: one dies under load, and no client that asks again loses a request.

ops1 is the second edge, and has the Redis of both. The engine repeats its prompt, so that what is measured is the way to it.
"""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from estate import HOSTS, LAB, Lab, changed, within

ADDRESS = "10.77.0.100"
INVENTORIES = "-i inventory/lab -i inventory/lab-edges -i /root/echo.json"
SITE = f"llmkeep site {INVENTORIES} --tags pki,redis,opa,llm_serving,edge,keepalived"
CLIENTS = 8
HAS = f"ip -oneline address show to {ADDRESS}"
ADDRESSES = {"ops1": "10.77.0.11", "llm1": "10.77.0.12"}
OTHER = {"ops1": "llm1", "llm1": "ops1"}
SCRIPT = Path(__file__).with_name("two_edges_client.py")
MOVES = "journalctl --boot --unit keepalived --output cat | grep --count 'Entering MASTER STATE'; true"
# What a router of this network would send that wants to be the only one: VRRP 3, router 51, priority 255, this one address.
FORGED = """
import socket
link = socket.socket(socket.AF_INET, socket.SOCK_RAW, 112)
link.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)
packet = bytes([0x31, 51, 255, 1, 0, 100, 0, 0]) + socket.inet_aton("10.77.0.100")
pseudo = socket.inet_aton("10.77.0.2") + socket.inet_aton(TARGET) + bytes([0, 112, 0, len(packet)])
words = pseudo + packet
total = sum(int.from_bytes(words[at : at + 2]) for at in range(0, len(words), 2))
total = ~(total + (total >> 16)) & 0xFFFF
for _ in range(5):
    link.sendto(packet[:6] + total.to_bytes(2) + packet[8:], (TARGET, 0))
"""
REFUSED = "nft list counter inet llmkeep refused_in | sed -n 's/.*packets \\([0-9]*\\).*/\\1/p'"
STRANGER = "runuser -u llm-engine -- timeout 5 bash -c 'exec 3<>/dev/tcp/10.77.0.11/6379' && echo reached || echo refused"
# One question to each of these edges in turn: what their gateways say of the cache.
CACHED = """
import json, ssl, sys
import httpx2
given = json.load(sys.stdin)
body = {"model": "echo", "prompt": given["prompt"], "temperature": 0, "max_tokens": 8}
headers = {"authorization": f"Bearer {given['key']}"}
with httpx2.Client(verify=ssl.create_default_context(cafile=given["ca"]), headers=headers, timeout=30) as client:
    for host in given["hosts"]:
        print(client.post(f"https://{host}/v1/completions", json=body).headers["x-llm-cache"])
"""
# How many of 40 requests to each of these edges in one minute are answered.
COUNTED = """
import json, ssl, sys, time
import httpx2
given = json.load(sys.stdin)
headers = {"authorization": f"Bearer {given['key']}"}
if time.time() % 60 > 30:
    time.sleep(60 - time.time() % 60)
with httpx2.Client(verify=ssl.create_default_context(cafile=given["ca"]), headers=headers, timeout=30) as client:
    print(sum(client.get(f"https://{host}/v1/models").status_code == 200 for host in given["hosts"] * 40))
"""
# Seconds until the address answers, asked each tenth of a second: from the first failure after this began.
GAP = """
import socket, ssl, sys, time
REQUEST = b"GET /readyz HTTP/1.1\\r\\nHost: ask\\r\\nConnection: close\\r\\n\\r\\n"
context = ssl.create_default_context(cafile=sys.argv[1])
lost = None
print("asking", flush=True)
while True:
    try:
        plain = socket.create_connection(("10.77.0.100", 443), 0.5)
        with context.wrap_socket(plain, server_hostname="10.77.0.100") as link:
            link.sendall(REQUEST)
            right = link.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        right = False
    now = time.monotonic()
    if lost is None and not right:
        lost = now
    if lost is not None and right:
        print(now - lost)
        break
    time.sleep(0.1)
"""


def holders(lab: Lab) -> list[str]:
    """Hosts that have the address."""
    return [host for host in HOSTS if lab.on(host, HAS)]


def ready(lab: Lab, host: str) -> bool:
    """Whether this edge could take the address."""
    as_user = "runuser --user llmkeep-edge-ready -- /usr/local/lib/llmkeep/edge-ready"
    return lab.run("exec", host, "--", "sh", "-c", as_user, check=False).returncode == 0


@contextmanager
def asking(lab: Lab, ca: Path) -> Iterator[list[float]]:
    """Clients that only ask whether the address answers; afterwards, how many seconds it did not, before it did again."""
    seconds: list[float] = []
    with subprocess.Popen(
        [LAB, "netns", "--", sys.executable, "-c", GAP, ca],
        env={"LAB_INSTANCE": lab.instance, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "asking\n"
        yield seconds
        said, _ = process.communicate(timeout=60)
        seconds.append(float(said))


@pytest.fixture(scope="module")
def edges(estate: Lab) -> Lab:
    """The estate, whose control node is an edge, too, and has the gateways' Redis."""
    echo = {"serve": {"vars": {"llm_serving_models": [{"name": "echo", "driver": "echo"}]}}}
    estate.on("ops1", "cat > /root/echo.json", given=json.dumps(echo))
    began = time.monotonic()
    estate.on("ops1", SITE)
    print(f"site.yml for the second edge: {time.monotonic() - began:.0f} s")
    return estate


@pytest.fixture(scope="module")
def ca(edges: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edges") / "ca.pem"
    path.write_text(edges.on("ops1", "cat /etc/llmkeep/pki/root.pem"))
    return path


@pytest.fixture(scope="module")
def keys(edges: Lab) -> list[str]:
    """A key for each client, known to both hosts."""
    add = "llm-serve keys add --json --tenant t --role developer --subject"
    made = edges.on("ops1", "; ".join(f"{add} client-{number}@lab" for number in range(CLIENTS)))
    edges.on("llm1", 'while read -r key; do echo "$key" | llm-serve keys import --json; done', given=made)
    return [json.loads(line)["key"] for line in made.splitlines()]


@pytest.fixture(scope="module")
def cached(edges: Lab, ca: Path, keys: list[str]) -> Callable[..., list[str]]:
    """Ask the edges of these hosts the same, which none was asked before: `hit`, `miss` or `bypass` of each."""
    prompts = itertools.count()

    def ask(*hosts: str) -> list[str]:
        given = {
            "prompt": f"question {next(prompts)}",
            "key": keys[0],
            "ca": str(ca),
            "hosts": [ADDRESSES[host] for host in hosts],
        }
        return edges.run("netns", "--", sys.executable, "-c", CACHED, given=json.dumps(given)).stdout.split()

    return ask


def test_an_answer_of_one_edge_is_cached_for_itself_alone(cached: Callable[..., list[str]]) -> None:
    within(60, "a cached answer", lambda: cached("llm1", "ops1", "llm1") == ["miss", "miss", "hit"])


def test_a_quota_is_counted_over_both_edges(edges: Lab, ca: Path, keys: list[str]) -> None:
    """60 requests a minute, of which each of four gateways may leave a lease of three unused."""
    given = {"key": keys[-1], "ca": str(ca), "hosts": [ADDRESSES[host] for host in ("llm1", "ops1")]}
    said = edges.run("netns", "--", sys.executable, "-c", COUNTED, given=json.dumps(given)).stdout
    assert 45 <= int(said) <= 60


def test_no_other_process_of_the_host_reaches_the_shared_redis(edges: Lab) -> None:
    assert edges.on("llm1", STRANGER).strip() == "refused"


def test_without_the_shared_redis_both_edges_answer(edges: Lab, cached: Callable[..., list[str]]) -> None:
    edges.on("ops1", "systemctl stop redis-server.service")
    assert cached("llm1", "ops1", "llm1") == ["miss"] * 3
    edges.on("ops1", "systemctl start redis-server.service")
    within(60, "a cached answer again", lambda: cached("llm1", "llm1") == ["miss", "hit"])


def test_one_edge_has_the_address_and_both_have_its_certificate(edges: Lab, ca: Path) -> None:
    within(30, "one host has the address", lambda: len(holders(edges)) == 1)
    check = f"import ssl; print(ssl.get_server_certificate(('{ADDRESS}', 443), ca_certs='{ca}')[:27])"
    assert edges.outside(sys.executable, "-c", check).stdout == "-----BEGIN CERTIFICATE-----\n"


def test_an_edge_that_loses_its_power_under_load_loses_no_request_of_clients_that_ask_again(
    edges: Lab, ca: Path, keys: list[str], tmp_path: Path
) -> None:
    # Redis stays: the first edge goes. An edge that is stopped as it should be gives the address away.
    if holders(edges) == ["ops1"]:
        edges.on("ops1", "systemctl restart keepalived.service")
    within(30, "llm1 has the address", lambda: holders(edges) == ["llm1"])
    until = tmp_path / "end"
    given = {"url": f"https://{ADDRESS}/v1", "ca": str(ca), "keys": keys, "until": str(until)}
    answers: list[dict[str, Any]] = []

    def load() -> None:
        done = edges.run("netns", "--", sys.executable, str(SCRIPT), given=json.dumps(given), timeout=200)
        answers.extend(json.loads(done.stdout))

    clients = threading.Thread(target=load)
    clients.start()
    try:
        time.sleep(6)
        killed = time.time()
        edges.run("power-off", "llm1")
        within(60, "ops1 has the address", lambda: bool(edges.on("ops1", HAS)))
        time.sleep(8)
    finally:
        until.touch()
        clients.join(200)
    assert not [each for each in answers if "failed" in each or not each["right"]]
    gap = max(
        later - earlier for earlier, later in itertools.pairwise(sorted(each["answered"] for each in answers))
    )
    longest = max(each["answered"] - each["began"] for each in answers)
    after = sum(each["began"] > killed for each in answers)
    print(
        f"{len(answers)} requests, {after} of them after the power cut; {gap:.1f} s without an answer;"
        f" the longest took {longest:.1f} s"
    )
    assert after > 2 * CLIENTS
    assert len(answers) - after > 2 * CLIENTS
    # The other edge keeps the address when this one is back, and each answer is on record.
    moves = edges.on("ops1", MOVES)
    edges.run("power-on", "llm1")
    within(120, "llm1 is ready", lambda: ready(edges, "llm1"))
    within(
        10,
        "the signs of life of ops1",
        lambda: edges.on("llm1", "systemctl is-active keepalived || true") == "active\n",
    )
    time.sleep(5)
    assert holders(edges) == ["ops1"]
    assert edges.on("ops1", MOVES) == moves
    assert edges.on("llm1", MOVES).strip() == "0"
    recorded = {
        json.loads(line).get("http.request.id")
        for host in HOSTS
        for line in edges.on(
            host, f"llm-audit show --json --since {time.strftime('%Y-%m-%d', time.gmtime(killed - 60))}"
        ).splitlines()
    }
    assert {each["id"] for each in answers} <= recorded


@pytest.mark.parametrize("units", ["nginx", "llm-gateway@1 llm-gateway@2"], ids=["nginx", "the gateways"])
def test_the_address_leaves_an_edge_that_lost(edges: Lab, ca: Path, units: str) -> None:
    (host,) = holders(edges)
    within(60, "the other edge is ready", lambda: ready(edges, OTHER[host]))
    with asking(edges, ca) as seconds:
        edges.on(host, f"systemctl stop {units}")
    assert holders(edges) == [OTHER[host]]
    print(f"{units} stopped: {seconds[0]:.1f} s without an answer")
    edges.on(host, f"systemctl start {units}")


def test_another_host_of_the_network_cannot_take_the_address_by_vrrp(edges: Lab) -> None:
    (host,) = holders(edges)
    target = ADDRESSES[host]
    before, moves = int(edges.on(host, REFUSED)), edges.on(host, MOVES)
    edges.outside(sys.executable, "-c", f"TARGET = {target!r}\n{FORGED}")
    assert int(edges.on(host, REFUSED)) >= before + 5
    assert holders(edges) == [host]
    assert edges.on(host, MOVES) == moves


def test_a_second_run_changes_nothing(edges: Lab) -> None:
    assert changed(edges.on("ops1", SITE)) == {"llm1": 0, "ops1": 0}
