"""Two edges with an address each, in front of the engines of two hosts: an edge dies under load, and no client that asks again
loses a request; a host with an engine dies, and no client has to ask again.

ops1 is the second edge, has the Redis of both, and no engine; llm2 has an engine alone. The engine repeats its prompt, so that
what is measured is the way to it.
"""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from estate import HOSTS, LAB, ROOT, Lab, changed, within

ADDRESS = "10.77.0.100"
SECOND = "10.77.0.101"
INVENTORIES = "-i inventory/lab -i inventory/lab-edges -i /root/echo.json"
TAGS = "base,mirror,pki,redis,opa,llm_serving,engine_access,edge,operator_page,keepalived"
SITE = f"llmkeep site {INVENTORIES} --tags {TAGS}"
CLIENTS = 8
RUNS = "systemctl is-active --quiet llm-engine@echo.service && echo runs; true"
ADDRESSES = {"ops1": "10.77.0.11", "llm1": "10.77.0.12"}
ENGINES = ("llm1", "llm2")
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
# The sign-in at the page of the first of these edges, and the page of the other one with the session's cookie.
SIGNED_IN = """
import json, ssl, sys
import httpx2
given = json.load(sys.stdin)
first, other = given["hosts"]
name = "__Host-llmkeep-session"
headers = {"sec-fetch-site": "same-origin"}
with httpx2.Client(verify=ssl.create_default_context(cafile=given["ca"]), headers=headers, timeout=30) as client:
    print(client.post(f"https://{first}/page/sign-in", data={"key": given["key"]}).status_code)
    print(client.get(f"https://{other}/", headers={"cookie": f"{name}={client.cookies[name]}"}).status_code)
    print(client.get(f"https://{other}/").status_code)
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


def holders(lab: Lab, address: str = ADDRESS) -> list[str]:
    """Hosts that have the address."""
    show = f"ip -oneline address show to {address}"
    return [host for host in HOSTS if lab.on(host, show, check=False)]


def at_home(lab: Lab) -> bool:
    """Whether each edge has the address that is its own."""
    return (holders(lab), holders(lab, SECOND)) == (["llm1"], ["ops1"])


def ready(lab: Lab, host: str) -> bool:
    """Whether this edge could take the address."""
    as_user = "runuser --user llmkeep-edge-ready -- /usr/local/lib/llmkeep/edge-ready"
    return lab.run("exec", host, "--", "sh", "-c", as_user, check=False).returncode == 0


def running(lab: Lab, host: str) -> bool:
    """Whether this host's engine runs."""
    return lab.on(host, RUNS) != ""


def invocation(lab: Lab) -> str:
    """Which start of llm2's engine runs."""
    return lab.on("llm2", "systemctl show --property InvocationID llm-engine@echo.service", check=False)


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
def edges(estate: Lab) -> Iterator[Lab]:
    """The estate, whose control node is an edge, too, and has the gateways' Redis; and a third host, with an engine."""
    # Where a run before this one has left the third host, all are up, which is refused.
    estate.run("--inventory", "inventory/lab", "--inventory", "inventory/lab-edges", "up", check=False)
    known = ROOT / ".lab/instances" / estate.instance / "known_hosts"
    estate.on("ops1", "cat > /etc/ssh/ssh_known_hosts", given=known.read_text())
    echo = {"llm_serving_models": [{"name": "echo", "driver": "echo", "token_seconds": 0.05}]}
    chat: dict[str, Any] = {"chat": {"hosts": {"ops1": {}}}}
    given = {"all": {"hosts": {"llm1": echo, "llm2": echo}, "children": chat}}
    estate.on("ops1", "cat > /root/echo.json", given=json.dumps(given))
    began = time.monotonic()
    estate.on("ops1", SITE)
    print(f"site.yml for the second edge and the third host: {time.monotonic() - began:.0f} s")
    yield estate
    # The next file has the hosts of before; `lab up` stores their inventory where it starts one of them.
    for host in ("llm2", "llm1"):
        estate.run("power-off", host)
    estate.run("--inventory", "inventory/lab", "up")


@pytest.fixture(scope="module")
def ca(edges: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edges") / "ca.pem"
    path.write_text(edges.on("ops1", "cat /etc/llmkeep/pki/root.pem"))
    return path


@pytest.fixture(scope="module")
def keys(edges: Lab) -> list[str]:
    """Keys for two groups of clients, known to both edges."""
    add = "llm-serve keys add --json --tenant t --role developer --subject"
    made = edges.on("ops1", "; ".join(f"{add} client-{number}@lab" for number in range(2 * CLIENTS)))
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


Asked = AbstractContextManager[list[dict[str, Any]]]


@pytest.fixture
def asked(edges: Lab, ca: Path, keys: list[str], tmp_path: Path) -> Callable[..., Asked]:
    """Clients that ask an address within a block, each by a key of its own, and were answered at its beginning; afterwards, what
    became of each request.
    """
    unused = iter(keys)

    @contextmanager
    def clients(
        address: str, retries: int, seconds: float, stream: bool = False
    ) -> Iterator[list[dict[str, Any]]]:
        until, count = tmp_path / address, tmp_path / f"{address}-answers"
        count.touch()
        given = {
            "url": f"https://{address}/v1",
            "ca": str(ca),
            "keys": list(itertools.islice(unused, CLIENTS)),
            "retries": retries,
            "seconds": seconds,
            "stream": stream,
            "until": str(until),
            "count": str(count),
        }
        answers: list[dict[str, Any]] = []

        def load() -> None:
            done = edges.run("netns", "--", sys.executable, str(SCRIPT), given=json.dumps(given), timeout=200)
            answers.extend(json.loads(done.stdout))

        client = threading.Thread(target=load)
        client.start()
        try:
            within(60, "answers", lambda: count.stat().st_size > 2 * CLIENTS)
            yield answers
        finally:
            until.touch()
            client.join(200)

    return clients


def test_an_answer_of_one_edge_is_cached_for_itself_alone(cached: Callable[..., list[str]]) -> None:
    within(60, "a cached answer", lambda: cached("llm1", "ops1", "llm1") == ["miss", "miss", "hit"])


def test_a_quota_is_counted_over_both_edges(edges: Lab, ca: Path, keys: list[str]) -> None:
    """60 requests a minute, of which each of four gateways may leave a lease of three unused."""
    given = {"key": keys[-1], "ca": str(ca), "hosts": [ADDRESSES[host] for host in ("llm1", "ops1")]}
    said = edges.run("netns", "--", sys.executable, "-c", COUNTED, given=json.dumps(given)).stdout
    assert 45 <= int(said) <= 60


def test_a_session_of_one_edge_is_a_session_of_the_other(edges: Lab, ca: Path, keys: list[str]) -> None:
    given = {"key": keys[0], "ca": str(ca), "hosts": [ADDRESSES[host] for host in ("llm1", "ops1")]}
    said = edges.run("netns", "--", sys.executable, "-c", SIGNED_IN, given=json.dumps(given)).stdout
    assert said.split() == ["303", "200", "303"]


def test_no_other_process_of_the_host_reaches_the_shared_redis(edges: Lab) -> None:
    assert edges.on("llm1", STRANGER).strip() == "refused"


@pytest.mark.parametrize("host", ENGINES)
def test_both_edges_answer_by_the_engine_of_either_host(
    edges: Lab, cached: Callable[..., list[str]], host: str
) -> None:
    edges.on(host, "systemctl stop llm-engine@echo.service")
    assert cached("llm1", "ops1") == ["miss"] * 2
    edges.on(host, "systemctl start llm-engine@echo.service")


def test_a_host_with_engines_alone_has_neither_gateway_nor_record(edges: Lab) -> None:
    units = edges.on(
        "llm2", "systemctl list-units --plain --no-legend 'llm-*' nginx.service redis-server.service"
    )
    assert [line.split()[0] for line in units.splitlines()] == [
        "llm-engine-access.service",
        "llm-engine@echo.service",
    ]


def test_a_host_with_an_engine_that_loses_its_network_under_load_loses_no_request(
    edges: Lab, asked: Callable[..., Asked]
) -> None:
    """None of clients that ask once: a request that had not begun to answer goes to the other host."""
    for host in ENGINES:
        within(60, f"the engine of {host}", partial(running, edges, host))
    with asked(ADDRESSES["ops1"], retries=0, seconds=30) as answers:
        edges.run("cut", "llm2")
        time.sleep(9)
        edges.run("join", "llm2")
        time.sleep(5)
    assert not [each for each in answers if "failed" in each or not each["right"]]
    longest = max(each["answered"] - each["began"] for each in answers)
    print(f"{len(answers)} requests while an engine's host was away; the longest took {longest:.1f} s")
    assert len(answers) > 8 * CLIENTS


def test_a_host_with_an_engine_that_reboots_under_load_ends_the_answers_that_it_has_begun(
    edges: Lab, asked: Callable[..., Asked]
) -> None:
    """As `llmkeep patch` reboots it: no stream breaks, since its engine is stopped before the way to it is."""
    for host in ENGINES:
        within(60, f"the engine of {host}", partial(running, edges, host))
    began = invocation(edges)
    with asked(ADDRESSES["ops1"], retries=0, seconds=30, stream=True) as answers:
        edges.on(
            "llm2", "systemd-run --quiet --on-active=0.1 --timer-property=AccuracySec=10ms systemctl reboot"
        )
        within(60, "another boot", lambda: invocation(edges) not in ("", began) and running(edges, "llm2"))
        time.sleep(3)
    assert not [each for each in answers if "failed" in each or not each["right"]]
    assert len(answers) > 4 * CLIENTS


def test_without_the_shared_redis_both_edges_answer(edges: Lab, cached: Callable[..., list[str]]) -> None:
    edges.on("ops1", "systemctl stop redis-server.service")
    assert cached("llm1", "ops1", "llm1") == ["miss"] * 3
    edges.on("ops1", "systemctl start redis-server.service")
    within(60, "a cached answer again", lambda: cached("llm1", "llm1") == ["miss", "hit"])


@pytest.mark.parametrize("address", [ADDRESS, SECOND])
def test_each_edge_has_an_address_and_both_have_its_certificate(edges: Lab, ca: Path, address: str) -> None:
    within(60, "each edge has its address", lambda: at_home(edges))
    check = f"import ssl; print(ssl.get_server_certificate(('{address}', 443), ca_certs='{ca}')[:27])"
    assert edges.outside(sys.executable, "-c", check).stdout == "-----BEGIN CERTIFICATE-----\n"


def test_an_edge_that_loses_its_power_under_load_loses_no_request_of_clients_that_ask_again(
    edges: Lab, asked: Callable[..., Asked], tmp_path: Path
) -> None:
    within(60, "each edge has its address", lambda: at_home(edges))
    count = tmp_path / f"{ADDRESS}-answers"
    try:
        with (
            asked(ADDRESS, retries=20, seconds=3) as answers,
            asked(ADDRESSES["ops1"], retries=0, seconds=30) as others,
        ):
            killed, before = time.time(), count.stat().st_size
            edges.run("power-off", "llm1")
            within(60, "ops1 has both", lambda: holders(edges) == holders(edges, SECOND) == ["ops1"])
            within(60, "answers after it", lambda: count.stat().st_size > before + 4 * CLIENTS)
    finally:
        edges.run("power-on", "llm1", check=False)
    # llm1 had an engine, too: at the other edge, not even a client that asks once notices.
    assert not [each for each in others if "failed" in each or not each["right"]]
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
    # The address goes back to its edge, and each answer is on record.
    within(120, "each edge has its address again", lambda: at_home(edges))
    recorded = {
        json.loads(line).get("http.request.id")
        for host in HOSTS
        for line in edges.on(
            host, f"llm-audit show --json --since {time.strftime('%Y-%m-%d', time.gmtime(killed - 60))}"
        ).splitlines()
    }
    assert {each["id"] for each in (*answers, *others)} <= recorded


@pytest.mark.parametrize("units", ["nginx", "llm-gateway@1 llm-gateway@2"], ids=["nginx", "the gateways"])
def test_the_address_leaves_an_edge_that_lost(edges: Lab, ca: Path, units: str) -> None:
    within(60, "each edge has its address", lambda: at_home(edges) and ready(edges, "ops1"))
    with asking(edges, ca) as seconds:
        edges.on("llm1", f"systemctl stop {units}")
    assert holders(edges) == ["ops1"]
    print(f"{units} stopped: {seconds[0]:.1f} s without an answer")
    edges.on("llm1", f"systemctl start {units}")


def test_another_host_of_the_network_cannot_take_the_address_by_vrrp(edges: Lab) -> None:
    within(60, "each edge has its address", lambda: at_home(edges))
    host, target = "llm1", ADDRESSES["llm1"]
    before, moves = int(edges.on(host, REFUSED)), edges.on(host, MOVES)
    edges.outside(sys.executable, "-c", f"TARGET = {target!r}\n{FORGED}")
    assert int(edges.on(host, REFUSED)) >= before + 5
    assert at_home(edges)
    assert edges.on(host, MOVES) == moves


def test_a_second_run_changes_nothing(edges: Lab) -> None:
    assert changed(edges.on("ops1", SITE)) == {"llm1": 0, "llm2": 0, "ops1": 0}
