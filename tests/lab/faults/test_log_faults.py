"""What hosts log through faults: every numbered line is found afterwards, without intervention, and the API answers meanwhile.

A sample of each in the suite. In `make storm`: STORM kills from the seed SEED, STORM_MINUTES of outage, bursts of 50,000 lines.
The hosts are containers: a power cut ends all processes, and loses nothing that was written, flushed or not.
"""

import json
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
from estate import (
    HOSTS,
    QUESTION,
    ROOT,
    WITH_LOGS,
    Client,
    Lab,
    answers,
    elasticsearch,
    open_client,
    request,
    within,
)

STORM = "STORM" in os.environ
KILLS = int(os.environ.get("STORM", "1"))
OUTAGE = 60 * float(os.environ.get("STORM_MINUTES", "0.1"))
BURST = 50_000 if STORM else 5_000
MOMENT = random.Random(f"{os.environ.get('SEED', '5')} log faults")  # noqa: S311 - a moment
RECOVERY = 300
RUN = uuid.uuid4().hex[:6]  # so that the tests may be run again on the same hosts
COUNTED = (ROOT / "roles/filebeat/files/delivered.py").read_text().partition("def main")[0]

# Lines as our services write them. NUMBERS of them, or until it is stopped; PER_SECOND, or as fast as they go.
WRITER = """
import itertools, json, sys, time
stream, numbers, per_second = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for number in range(numbers) if numbers else itertools.count():
    print(json.dumps({"event.action": stream, "event.sequence": number, "message": "numbered"}), flush=True)
    if per_second:
        time.sleep(1 / per_second)
"""


@pytest.fixture(scope="module")
def client(logged: Lab) -> Client:
    return open_client(logged)


@dataclass(frozen=True)
class Lines:
    """Numbered lines of a unit of its own."""

    lab: Lab
    name: str
    host: str = "llm1"

    @property
    def stream(self) -> str:
        return f"{self.name}-{RUN}"

    @property
    def unit(self) -> str:
        return f"llm-{self.stream}.service"

    def begin(self, numbers: int = 0, per_second: float = 0) -> None:
        self.lab.on(
            self.host,
            f"systemd-run --quiet --collect --unit={self.unit} python3 - {self.stream} {numbers} {per_second}".replace(
                "python3 -", f"python3 -c '{WRITER}'"
            ),
        )

    def end(self, numbers: int = 0) -> int:
        """Wait for the last of so many lines, or stop; how many the journal has, which has lost none before the last one."""
        if numbers:
            ended = f"systemctl is-active --quiet {self.unit} || echo ended; true"
            within(120, "all lines are written", lambda: self.lab.on(self.host, ended).strip() == "ended")
        else:
            # By its end the writer may have gone by itself, and with --collect its unit, too.
            self.lab.on(self.host, f"systemctl stop {self.unit} || ! systemctl is-active --quiet {self.unit}")
        written = self.lab.on(
            self.host, f"journalctl --sync; journalctl --quiet -o cat -u {self.unit} | grep '^{{'; true"
        )
        found = [json.loads(line)["event.sequence"] for line in written.splitlines()]
        assert found == list(range(numbers or len(found))), f"the journal has {len(found)} of the lines"
        assert found
        return len(found)

    def found(self) -> Counter[int]:
        """How many documents there are of each number."""
        asked = {
            "size": 0,
            "query": {"term": {"event.action": self.stream}},
            "aggs": {"numbers": {"terms": {"field": "event.sequence", "size": 60_000}}},
        }
        path = f"/logs-llmkeep.service-{self.host}/_search?ignore_unavailable=true"
        answer = elasticsearch(self.lab, "POST", path, asked)
        # Without the stream, there is no aggregation either.
        buckets = answer.get("aggregations", {"numbers": {"buckets": []}})["numbers"]["buckets"]
        return Counter({each["key"]: each["doc_count"] for each in buckets})

    def all_arrive(self, numbers: int = 0) -> None:
        """Every number is there once: what is sent again has the same id, and no stream gets a new index meanwhile."""
        written, began = self.end(numbers), time.monotonic()
        within(RECOVERY, f"all of {written} lines are found", lambda: len(self.found()) == written)
        more = self.found().total() - written
        print(
            f"{self.stream}: {written} lines, complete {time.monotonic() - began:.1f} s after the last line"
        )
        assert not more, f"{more} duplicates"


@contextmanager
def served(client: Client) -> Iterator[None]:
    """Meanwhile, the API answers every request: what it refuses with 503, as where the machine is too busy for a decision of the
    policy in time, at the next attempt or the one after.
    """
    statuses: list[int] = []
    over = threading.Event()

    def asked() -> int:
        try:
            return request(client, "POST", "/generate", {"prompt": QUESTION, "max_tokens": 1})[0]
        except OSError:
            return 0

    def ask() -> None:
        while not over.wait(2):  # a subject may ask 60 times a minute
            attempts = 1
            while (status := asked()) == 503 and attempts < 3:
                time.sleep(attempts)
                attempts += 1
            statuses.append(status)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
    assert statuses
    assert set(statuses) == {200}, Counter(statuses)


def shipped(lab: Lab, counter: str, host: str = "llm1") -> int:
    """A counter of the Filebeat of a host since its start: documents `dropped` were given up, `failed` are sent again."""
    return int(lab.on(host, "python3 -", given=f"{COUNTED}print(counted()['{counter}'])\n"))


def test_a_burst_arrives(logged: Lab, client: Client) -> None:
    lines = Lines(logged, "burst")
    with served(client):
        lines.begin(BURST)
        lines.all_arrive(BURST)
    merged = elasticsearch(logged, "POST", "/logs-llmkeep.service-llm1/_forcemerge?max_num_segments=1")
    assert merged["_shards"]["failed"] == 0
    # It is red for the moment in which an index is made.
    health = elasticsearch(logged, "GET", "/_cluster/health?wait_for_status=yellow&timeout=30s")
    assert not health["timed_out"], health


def test_filebeat_is_killed_in_a_burst(logged: Lab, client: Client) -> None:
    lines = Lines(logged, "filebeat-killed")
    with served(client):
        lines.begin(per_second=500)
        for _ in range(KILLS):
            time.sleep(MOMENT.uniform(0.5, 3))
            logged.on("llm1", "systemctl kill --signal=KILL filebeat.service")
        lines.all_arrive()


def test_elasticsearch_is_killed_while_it_indexes(logged: Lab, client: Client) -> None:
    lines = Lines(logged, "elasticsearch-killed")
    with served(client):
        lines.begin(per_second=200)
        within(30, "it indexes", lambda: bool(lines.found()))
        for _ in range(KILLS):
            time.sleep(MOMENT.uniform(0, 40 if STORM else 1))
            logged.on("ops1", "systemctl kill --signal=KILL elasticsearch.service")
        lines.all_arrive()


def test_elasticsearch_is_away(logged: Lab, client: Client) -> None:
    lines = Lines(logged, "away")
    with served(client):
        logged.on("ops1", "systemctl stop elasticsearch.service")
        lines.begin(per_second=100)
        time.sleep(OUTAGE)
        logged.on("ops1", "systemctl start --no-block elasticsearch.service")
        lines.all_arrive()


def test_elasticsearch_refuses_writes_since_its_disk_is_full(logged: Lab, client: Client) -> None:
    """Elasticsearch itself blocks all indices, as at its flood stage, which is put above what the disk has.

    Filebeat sends again, after pauses that grow, what it refused.
    """
    stages = ("low", "high", "flood_stage")
    settings = {f"cluster.routing.allocation.disk.watermark.{stage}": "100pb" for stage in stages}
    settings["cluster.info.update.interval"] = "10s"
    blocks = "/logs-llmkeep.service-llm1/_settings?flat_settings=true"
    blocked = "index.blocks.read_only_allow_delete"

    def refusals() -> list[int]:
        return [shipped(logged, "failed", host) for host in HOSTS]

    refused = [shipped(logged, "dropped", host) for host in HOSTS]
    both = [Lines(logged, "full", host) for host in HOSTS]
    with served(client):
        elasticsearch(logged, "PUT", "/_cluster/settings", {"persistent": settings})
        within(60, "it refuses writes", lambda: blocked in str(elasticsearch(logged, "GET", blocks)))
        for lines in both:
            lines.begin(100)
        for lines in both:
            lines.end(100)
        before = refusals()
        within(
            120,
            "both are refused",
            lambda: all(now > then for now, then in zip(refusals(), before, strict=True)),
        )
        assert not any(lines.found() for lines in both)
        elasticsearch(logged, "PUT", "/_cluster/settings", {"persistent": dict.fromkeys(settings)})
        for lines in both:
            lines.all_arrive(100)
    assert [shipped(logged, "dropped", host) for host in HOSTS] == refused


def test_the_key_of_a_host_is_revoked_and_a_new_one_ships_what_waited(logged: Lab, client: Client) -> None:
    lines = Lines(logged, "revoked")
    with served(client):
        lines.begin(per_second=20)
        within(30, "they arrive", lambda: bool(lines.found()))
        elasticsearch(logged, "DELETE", "/_security/api_key", {"name": "filebeat-llm1"})
        time.sleep(5)
        logged.on("ops1", f"llmkeep site {WITH_LOGS} --limit llm1,ops1 --tags filebeat")
        lines.all_arrive()


def test_certificates_are_renewed_under_load(logged: Lab, client: Client) -> None:
    serial = "openssl x509 -noout -serial -in /etc/llmkeep/pki/host.pem"
    before = {host: logged.on(host, serial) for host in HOSTS}
    lines = Lines(logged, "renewed")
    with served(client):
        lines.begin(per_second=100)
        # They live 90 days.
        logged.operate("run playbooks/renew.yml", """-e '{"pki_renew_days": 90}'""")
        lines.all_arrive()
    assert all(logged.on(host, serial) != before[host] for host in HOSTS)


# Each a unit's output; what is found of it are as many documents as its entries in the journal.
ODD = """
import os, sys
out = lambda text: os.write(1, text)
out(b"first\\n")
for _ in range(10): out(b"x" * 1_000_000)
out(b"\\n")
out(b"not UTF-8: \\xff\\xfe\\xc3(\\n")
out(b"with\\0NULs\\0\\n")
out(b"y" * 49_151 + b"\\n" + b"z" * 49_152 + b"\\n" + b"{" * 49_153 + b"\\n")
out(b'{"event.action": "odd", "message": "not UTF-8: \\xff"}\\n')
out(b"last\\n")
"""
# One entry of 10 MB, handed over in a file, as the journal's own protocol has it for large ones.
ONE_ENTRY = """
import fcntl, os, socket, struct, time
text = b"w" * 10_000_000
file = os.memfd_create("entry", os.MFD_ALLOW_SEALING)
for part in (b"SYSLOG_IDENTIFIER=odd\\n", b"MESSAGE\\n" + struct.pack("<Q", len(text)) + text + b"\\n"):
    while part: part = part[os.write(file, part):]
fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
link.connect("/run/systemd/journal/socket")
socket.send_fds(link, [], [file])
time.sleep(1)  # the journal asks of a process that is there whose it is
"""


def test_lines_that_are_too_long_or_no_text(logged: Lab, client: Client) -> None:
    def counted(path: str, number: int) -> bool:
        return bool(elasticsearch(logged, "GET", path)["count"] == number)

    refused = shipped(logged, "dropped")
    with served(client):
        for name, program in (("odd", ODD), ("llm-odd", ODD), ("one-entry", ONE_ENTRY)):
            unit = f"{name}-{RUN}"
            logged.on(
                "llm1",
                f'systemd-run --quiet --wait --collect --unit={unit} python3 -c "$(cat)"',
                given=program,
            )
            entries = "journalctl --sync; journalctl --quiet -o json --output-fields=PRIORITY _SYSTEMD_UNIT={}.service | wc -l"
            written = int(logged.on("llm1", entries.format(unit)))
            assert written
            count = f"/logs-llmkeep.*-llm1/_count?q=service.name:%22{unit}.service%22"
            within(60, f"all {written} entries of {unit} are found", partial(counted, count, written))
            print(f"{unit}: {written} entries")
        lines = Lines(logged, "after-odd")
        lines.begin(10)
        lines.all_arrive(10)
    assert shipped(logged, "dropped") == refused


def test_the_power_of_a_host_is_cut_while_it_logs(logged: Lab, client: Client) -> None:
    for number in range(KILLS):
        lines = Lines(logged, f"power-{number}")
        lines.begin(per_second=500)
        time.sleep(MOMENT.uniform(1, 3))
        logged.run("power-off", "llm1")
        logged.run("power-on", "llm1")
        lines.all_arrive()
    answers(client)
