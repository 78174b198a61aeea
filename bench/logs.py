#!/usr/bin/env python3
"""From a line in the journal to a document that is found: delay, CPU and memory of Filebeat and, in turns, of rsyslog.

A journald of its own (a namespace) gets lines at a steady rate; each shipper reads the same files of it, and writes to the same
Elasticsearch, the lab's build with 256 MB of heap, over plain HTTP. Each has a disk queue; Filebeat runs the role's processors,
rsyslog (imjournal, omelasticsearch) parses nothing. A line counts as found once a search counts as many documents as were
written up to it, asked every 50 ms; Elasticsearch makes documents visible once a second.

--sizes FILE measures instead what documents of each stream take in Elasticsearch, its snapshot, the journal and Filebeat's queue,
of lines that differ as those of an estate do, and writes it to FILE; `llmkeep size` reads that.

Run as root (journald, mount namespaces) by .venv/bin/python, with LLMKEEP_MIRROR set. rsyslog is looked for in --rsyslog, a
folder into which Debian's rsyslog, rsyslog-elasticsearch, libestr0, libfastjson4 and liblognorm5 were unpacked, or /.
Exit code 0, or 1 if a line was not found.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from stand import ROOT, cpu_seconds, resident_mb, skip

sys.path.append(str(ROOT / "tests/helpers"))
from search_server import SearchServer, search_server

from llmkeep.bundle import cache, programs

NAMESPACE = "llmkeepbench"
JOURNALD = "/usr/lib/systemd/systemd-journald"
# Whose kernel audit messages other programs of the machine make, is not ours: left as it is, and matched away.
SETTINGS = "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\nAudit=\nSystemMaxUse=2G\nCompress=no\n"
TEMPLATE = {
    "index_patterns": ["logs-llmkeep.*-*"],
    "data_stream": {},
    "template": {
        "settings": {
            "number_of_replicas": 0,
            "mapping.total_fields.ignore_dynamic_beyond_limit": True,
            "store.stats_refresh_interval": "0s",  # 10 s otherwise, of which --sizes would read old ones
        },
        "mappings": json.loads((ROOT / "roles/elasticsearch/files/ecs.json").read_text()),
    },
}
CHANCE = random.Random(17)  # noqa: S311 - no secret
BULK = 400  # as in roles/filebeat
TENANTS = [f"tenant-{number}" for number in range(20)]


def hexadecimal(size: int) -> str:
    return CHANCE.randbytes(size).hex()


# ---------------------------------------------------------------- lines as an estate has them
def gateway_line(number: int) -> str:
    """An answered request, as the gateway logs it."""
    return json.dumps(
        {
            "@timestamp": f"2026-11-27T12:{number // 60 % 60:02}:{number % 60:02}.{number % 1000:03}+00:00",
            "log.level": "info",
            "log.logger": "llmserve.gateway",
            "message": "answered",
            "ecs.version": "8.11",
            "http.request.id": hexadecimal(16),
            "http.request.method": "POST",
            "http.response.status_code": CHANCE.choice([200] * 19 + [429]),
            "url.path": CHANCE.choice(["/generate", "/v1/chat/completions"]),
            "event.duration": CHANCE.randrange(10**8, 10**10),
            "trace.id": hexadecimal(16),
            "user.id": f"user-{CHANCE.randrange(500)}",
            "organization.id": CHANCE.choice(TENANTS),
            "gen_ai.request.model": "llama-70b",
            "gen_ai.usage.input_tokens": CHANCE.randrange(4000),
            "gen_ai.usage.output_tokens": CHANCE.randrange(1000),
            "llm.cache": "miss",
            "llm.finish_reason": "stop",
        }
    )


def edge_line(number: int) -> str:
    """nginx's, by roles/edge's log_format."""
    return json.dumps(
        {
            "client": f"10.1.{CHANCE.randrange(8)}.{CHANCE.randrange(250)}",
            "method": "POST",
            "path": "/generate",
            "protocol": "HTTP/2.0",
            "status": 200,
            "bytes": CHANCE.randrange(20000),
            "seconds": number % 9000 / 1000,
            "upstream": "unix:/run/llm-gateway/1.sock",
            "upstream_status": "200",
            "upstream_seconds": f"{number % 9000 / 1000}",
            "tls": "TLSv1.3",
            "group": "X25519MLKEM768",
            "limited": "--",
            "request_id": hexadecimal(16),
        }
    )


def auth_line(number: int) -> str:
    client = f"10.1.0.{number % 250} port {CHANCE.randrange(65536)}"
    return f"Accepted publickey for ops{number % 7} from {client} ssh2: ED25519 SHA256:{hexadecimal(16)}"


def system_line(number: int) -> str:
    return f"Started session-{number}.scope - unit {hexadecimal(4)} of user {number % 90}, took {CHANCE.randrange(9999)} ms."


def audit_line(number: int) -> str:
    """A line of the audit record, as audit_ship.py prints it; a request has two."""
    record = {
        "@timestamp": f"2026-11-27T12:{number // 60 % 60:02}:{number % 60:02}.{number % 1000:03}Z",
        "event.action": "generate",
        "event.category": "web",
        "event.duration": CHANCE.randrange(10**8, 10**10),
        "event.kind": "event",
        "event.outcome": "success",
        "event.sequence": number,
        "event.type": "access",
        "gen_ai.request.model": "llama-70b",
        "gen_ai.usage.input_tokens": CHANCE.randrange(4000),
        "gen_ai.usage.output_tokens": CHANCE.randrange(1000),
        "http.request.id": hexadecimal(16),
        "http.response.status_code": 200,
        "llmkeep.audit.phase": "outcome",
        "llmkeep.audit.source": "llm1",
        "llmkeep.decision.id": hexadecimal(16),
        "llmkeep.decision.revision": "sha256:" + "5" * 64,
        "llmkeep.prompt.hmac": hexadecimal(32),
        "organization.id": CHANCE.choice(TENANTS),
        "source.ip": f"10.1.{CHANCE.randrange(8)}.{CHANCE.randrange(250)}",
        "transaction.id": hexadecimal(16),
        "url.path": "/generate",
        "user.id": f"user-{CHANCE.randrange(500)}",
        "llmkeep.audit.previous": hexadecimal(32),
        "llmkeep.audit.hash": hexadecimal(32),
    }
    return json.dumps(
        {
            "message": "a line of the audit record",
            "event.action": "audit_shipped",
            "event.sequence": number,
            "llmkeep.audit.leaf": hexadecimal(32),
            "llmkeep.audit.record": json.dumps(record, separators=(",", ":")),
        }
    )


SHIP = "llmkeep-audit-ship.service"
# By stream, and kind where a stream has two: the line, identifier, unit.
KINDS = {
    "llmkeep.service": (gateway_line, "python", "llm-gateway@1.service"),
    "llmkeep.service/audit": (audit_line, "python3", SHIP),
    "llmkeep.edge": (edge_line, "llmkeep_edge", "nginx.service"),
    "llmkeep.auth": (auth_line, "sshd-session", "ssh.service"),
    "llmkeep.system": (system_line, "systemd", "init.scope"),
}


def entry(stream: str, number: int) -> dict[str, Any]:
    """The journal's entry of such a line, as Filebeat's journal input gives it to the processors."""
    make, identifier, unit = KINDS[stream]
    return {
        "@timestamp": f"2026-11-27T12:{number // 60 % 60:02}:{number % 60:02}.000Z",
        "message": make(number),
        "syslog": {"identifier": identifier, "priority": 6, "facility": 3},
        "systemd": {"transport": "stdout", "unit": unit, "slice": "system.slice"},
        "journald": {
            "pid": 1000 + number % 50,
            "process": {"name": identifier, "executable": "/usr/lib/openssh/sshd-session"},
        },
        "process": {"pid": 1000 + number % 50, "command_line": "x"},
        "host": {"hostname": "llm1"},
        "event": {"kind": "event"},
    }


# ---------------------------------------------------------------- journal
class Journal:
    """A journald of our own, and how to write to it."""

    def __init__(self) -> None:
        self.settings = Path(f"/run/systemd/journald@{NAMESPACE}.conf.d/bench.conf")
        self.settings.parent.mkdir(parents=True)
        self.settings.write_text(SETTINGS)
        machine = Path("/etc/machine-id").read_text().strip()
        self.plain, self.files = (
            Path("/var/log/journal", name) for name in (machine, f"{machine}.{NAMESPACE}")
        )
        self.run = Path(f"/run/systemd/journal.{NAMESPACE}")
        self.process = subprocess.Popen(
            [JOURNALD, NAMESPACE],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "SYSTEMD_JOURNAL_COMPACT": "0"},
        )
        end = time.monotonic() + 30
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        while True:
            try:
                self.socket.connect(str(self.run / "socket"))
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def write(self, line: str, identifier: str = "bench") -> None:
        self.socket.send(f"MESSAGE={line}\nPRIORITY=6\nSYSLOG_IDENTIFIER={identifier}\n".encode())

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        for folder in (self.settings.parent, self.run, self.files):
            shutil.rmtree(folder, ignore_errors=True)
        if self.plain.exists() and not any(self.plain.iterdir()):
            self.plain.rmdir()


@contextmanager
def journal() -> Iterator[Journal]:
    opened = Journal()
    try:
        yield opened
    finally:
        opened.close()


# ---------------------------------------------------------------- shippers
def filebeat_program() -> Path:
    with cache.alone():
        found = programs.find("filebeat")
    if not found:
        raise SystemExit("filebeat is not available here: set LLMKEEP_MIRROR to a folder that has it")
    return found


def filebeat(folder: Path, inputs: dict[str, Any], port: int) -> subprocess.Popen[bytes]:
    """With the role's processors and a queue on disk."""
    folder.mkdir()
    config = {
        "filebeat.inputs": [inputs],
        "processors": [
            *yaml.safe_load((ROOT / "roles/filebeat/files/processors.yml").read_text()),
            {
                "add_fields": {
                    "target": "",
                    "fields": {"host.name": "llm1.estate.internal", "data_stream.namespace": "bench"},
                }
            },
            # To an index of its own, whose bytes can be told.
            {
                "add_fields": {
                    "when": {"equals": {"service.name": SHIP}},
                    "target": "",
                    "fields": {"data_stream.namespace": "audit"},
                }
            },
        ],
        "queue.disk": {"path": str(folder / "queue"), "max_size": "1024MB"},
        "output.elasticsearch": {
            "hosts": [f"http://127.0.0.1:{port}"],
            "index": "logs-%{[data_stream.dataset]}-%{[data_stream.namespace]}",
            "bulk_max_size": BULK,
        },
        "setup.template.enabled": False,
        "setup.ilm.enabled": False,
        "logging": {"to_files": False, "to_stderr": True, "level": "warning", "metrics.enabled": False},
    }
    path = folder / "filebeat.yml"
    path.write_text(yaml.safe_dump(config))
    path.chmod(0o600)
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [filebeat_program(), "-c", path, "--path.home", folder / "home"], stdout=output, stderr=output
        )


def filebeat_of(journal: Journal, folder: Path, port: int) -> subprocess.Popen[bytes]:
    inputs = {
        "type": "journald",
        "id": "journal",
        "paths": [str(journal.files)],
    }
    return filebeat(folder, inputs, port)


def rsyslog_of(journal: Journal, folder: Path, port: int, where: Path) -> subprocess.Popen[bytes]:
    """Debian's, reading the namespace's files where it looks for the machine's own."""
    folder.mkdir()
    modules = where / "usr/lib/x86_64-linux-gnu"
    path = folder / "rsyslog.conf"
    path.write_text(
        f"""global(workDirectory="{folder}")
module(load="imjournal" StateFile="state" Ratelimit.Interval="0")
module(load="omelasticsearch")
template(name="document" type="list") {{
  constant(value="{{\\"@timestamp\\":\\"") property(name="timereported" dateFormat="rfc3339")
  constant(value="\\",\\"message\\":\\"") property(name="msg" format="json")
  constant(value="\\",\\"host\\":{{\\"name\\":\\"") property(name="hostname" format="json")
  constant(value="\\"}},\\"log\\":{{\\"syslog\\":{{\\"appname\\":\\"bench\\"}}}}}}\\n")
}}
template(name="id" type="list") {{ property(name="uuid") }}
if $programname == "bench" then action(type="omelasticsearch" server="127.0.0.1" serverport="{port}" template="document"
  searchIndex="logs-llmkeep.system-bench" searchType="" bulkmode="on" writeoperation="create" bulkid="id" dynbulkid="on"
  action.resumeRetryCount="-1"
  queue.type="LinkedList" queue.filename="queue" queue.maxDiskSpace="1g" queue.saveOnShutdown="on" queue.dequeueBatchSize="1000")
"""
    )
    journal.plain.mkdir(exist_ok=True)
    mounted = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    command = [
        str(where / "usr/sbin/rsyslogd"),
        "-n",
        "-f",
        str(path),
        "-i",
        str(folder / "pid"),
        "-M",
        str(modules / "rsyslog"),
    ]
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [
                "unshare",
                "--mount",
                "sh",
                "-c",
                mounted,
                "sh",
                str(journal.files),
                str(journal.plain),
                *command,
            ],
            stdout=output,
            stderr=output,
            env={**os.environ, "LD_LIBRARY_PATH": str(modules)},
        )


# ---------------------------------------------------------------- delay
def count(server: SearchServer) -> int:
    status, answer = server.ask("GET", "/logs-llmkeep.system-bench/_count?q=log.syslog.appname:bench")
    return int(answer["count"]) if status == 200 else 0


def ended(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def one_round(
    server: SearchServer, journal: Journal, shipper: subprocess.Popen[bytes], rate: int, seconds: float
) -> dict[str, float]:
    """Delays of all lines in ms, and what shipper and server ran and hold."""
    for number in range(20):  # until it ships at all
        journal.write(f"warm {number}")
    end = time.monotonic() + 120
    while (before := count(server)) < 20:
        assert time.monotonic() < end, "the shipper ships nothing"
        time.sleep(0.2)
    assert server.process is not None
    started = {"shipper": cpu_seconds(shipper.pid), "server": cpu_seconds(server.process.pid)}
    lines = round(rate * seconds)
    written: list[float] = []

    def write() -> None:
        begun = time.monotonic()
        for number in range(lines):
            ahead = begun + number / rate - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
            journal.write(f"{number} {hexadecimal(60)}")
            written.append(time.monotonic())

    writer = threading.Thread(target=write)
    writer.start()
    delays: list[float] = []
    memory = 0.0
    last = time.monotonic() + seconds + 120
    while len(delays) < lines and time.monotonic() < last:
        found = count(server) - before
        now = time.monotonic()
        delays += [(now - written[number]) * 1e3 for number in range(len(delays), min(found, len(written)))]
        memory = max(memory, resident_mb(shipper.pid))
        time.sleep(0.05)
    writer.join()
    cuts = statistics.quantiles(delays, n=100) if len(delays) > 1 else [0.0] * 99
    return {
        "lost": lines - len(delays),
        "reached": lines / (written[-1] - written[0]),
        "p50": cuts[49],
        "p99": cuts[98],
        "shipper_us": (cpu_seconds(shipper.pid) - started["shipper"]) / lines * 1e6,
        "server_us": (cpu_seconds(server.process.pid) - started["server"]) / lines * 1e6,
        "memory": memory,
    }


def shipped_round(
    given: argparse.Namespace, server: SearchServer, opened: Journal, name: str, rate: int, folder: Path
) -> dict[str, float]:
    """A round of a shipper that begins at an empty journal and without a stream."""
    if name == "Filebeat":
        shipper = filebeat_of(opened, folder, server.port)
    else:
        shipper = rsyslog_of(opened, folder, server.port, given.rsyslog)
    try:
        return one_round(server, opened, shipper, rate, given.seconds)
    except AssertionError:
        print((folder / "output").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        ended(shipper)
        server.ask("DELETE", "/_data_stream/logs-llmkeep.*")


def delays(given: argparse.Namespace) -> int:
    lost = 0
    has_rsyslog = (given.rsyslog / "usr/sbin/rsyslogd").exists()
    if not has_rsyslog:
        skip("rsyslog is not there: see --help for the packages, and --rsyslog")
    names = ["Filebeat", *(["rsyslog"] if has_rsyslog else [])]
    rows: dict[tuple[int, str], list[dict[str, float]]] = {}
    with search_server() as server, tempfile.TemporaryDirectory() as temporary:
        server.do("PUT", "/_index_template/llmkeep-logs", TEMPLATE)
        for rate in given.rates:
            for number in range(given.rounds):
                for name in names[:: 1 if number % 2 == 0 else -1]:
                    with journal() as opened:
                        found = shipped_round(
                            given, server, opened, name, rate, Path(temporary, f"{name}-{rate}-{number}")
                        )
                    print(rate, name, json.dumps(found), file=sys.stderr, flush=True)
                    lost += int(found["lost"])
                    rows.setdefault((rate, name), []).append(found)
    print(
        f"{given.rounds} rounds of {given.seconds:g} s, in turns, median (least to most); load {os.getloadavg()[0]:.1f}\n"
    )
    heads = [
        "lines/s",
        "shipper",
        "p50 ms",
        "p99 ms",
        "shipper, CPU µs a line",
        "Elasticsearch, CPU µs a line",
        "shipper, MB",
        "not found",
    ]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for (rate, name), rounds in rows.items():
        cells = []
        for key in ("p50", "p99", "shipper_us", "server_us", "memory"):
            each = [row[key] for row in rounds]
            cells.append(f"{statistics.median(each):.0f} ({min(each):.0f} to {max(each):.0f})")
        print(f"| {rate} | {name} | {' | '.join(cells)} | {sum(row['lost'] for row in rounds):.0f} |")
    return int(lost > 0)


# ---------------------------------------------------------------- sizes
def shipped(
    server: SearchServer, folder: Path, streams: dict[str, int], port: int = 0
) -> subprocess.Popen[bytes]:
    """Filebeat, which reads so many entries of each stream from a file."""
    read = folder / "entries.ndjson"
    with read.open("w") as lines:
        for stream, number in streams.items():
            lines.writelines(json.dumps(entry(stream, each)) + "\n" for each in range(number))
    inputs = {
        "type": "filestream",
        "id": "entries",
        "paths": [str(read)],
        "parsers": [{"ndjson": {"target": "", "overwrite_keys": True}}],
    }
    return filebeat(folder / "filebeat", inputs, port or server.port)


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def index_of(kind: str) -> str:
    stream, _, namespace = kind.partition("/")
    return f"logs-{stream}-{namespace or 'bench'}"


def in_elasticsearch(server: SearchServer, streams: dict[str, int]) -> dict[str, float]:
    """Bytes a document of each stream, once it was shipped and flushed."""
    with tempfile.TemporaryDirectory() as temporary:
        shipper = shipped(server, Path(temporary), streams)
        try:
            end = time.monotonic() + 300
            while True:
                server.ask("POST", "/logs-llmkeep.*/_refresh")
                status, answer = server.ask("GET", "/logs-llmkeep.*/_count")
                found = answer["count"] if status == 200 else 0  # 503 while a stream is being made
                if found >= sum(streams.values()):
                    break
                assert time.monotonic() < end, (found, Path(temporary, "filebeat/output").read_text()[-2000:])
                time.sleep(0.5)
        finally:
            ended(shipper)
    # As an index that is written to no more ends: how many segments are left by chance would say twice or half.
    server.do("POST", "/logs-llmkeep.*/_forcemerge?max_num_segments=1&flush=true")
    return {
        stream: server.do("GET", f"/{index_of(stream)}/_stats/store")["_all"]["total"]["store"][
            "size_in_bytes"
        ]
        / number
        for stream, number in streams.items()
    }


def sizes(given: argparse.Namespace) -> int:
    streams = dict.fromkeys(KINDS, given.documents)
    journal_bytes, queue_bytes = {}, {}
    with search_server() as server:
        server.do("PUT", "/_index_template/llmkeep-logs", TEMPLATE)
        server.do(
            "PUT",
            "/_snapshot/llmkeep",
            {"type": "fs", "settings": {"location": str(server.snapshots), "compress": True}},
        )
        documents = in_elasticsearch(server, streams)
        server.do(
            "PUT",
            "/_snapshot/llmkeep/one?wait_for_completion=true",
            {"indices": "logs-llmkeep.*", "feature_states": ["none"]},
        )
        share = folder_bytes(server.snapshots) / sum(
            documents[stream] * number for stream, number in streams.items()
        )
    for stream, (make, identifier, _) in KINDS.items():
        with journal() as opened:
            for number in range(given.documents):
                opened.write(make(number), identifier)
            opened.process.send_signal(signal.SIGRTMIN + 1)  # to the disk
            time.sleep(2)
            journal_bytes[stream] = bytes_per_entry(opened.files)
        with tempfile.TemporaryDirectory() as temporary:
            shipper = shipped(server, Path(temporary), {stream: given.documents}, port=9)
            queue = Path(temporary, "filebeat/queue")
            seen, before = 0, -1
            while seen != before or not seen:
                time.sleep(3)
                seen, before = folder_bytes(queue) if queue.exists() else 0, seen
            ended(shipper)
            queue_bytes[stream] = seen / given.documents
    found = {
        "measured_with": f".venv/bin/python bench/logs.py --sizes llmkeep/sizes.json --documents {given.documents}",
        "bytes_per_document": {stream: round(size) for stream, size in documents.items()},
        "journal_bytes_per_line": {stream: round(size) for stream, size in journal_bytes.items()},
        "queue_bytes_per_document": {stream: round(size) for stream, size in queue_bytes.items()},
        "snapshot_share": round(share, 2),
    }
    given.sizes.write_text(json.dumps(found, indent=2) + "\n")
    print(given.sizes.read_text())
    return 0


def bytes_per_entry(folder: Path) -> float:
    """Of journal files: how far each is used, and its entries, the machine's audit messages among them.

    tail_object_offset and n_entries of the header, at 136 and 152 (systemd's JOURNAL_FILE_FORMAT); files grow by 8 MiB.
    """
    used, entries = 0, 0
    for path in folder.glob("*.journal"):
        with path.open("rb") as file:
            header = file.read(160)
        used += int.from_bytes(header[136:144], "little")
        entries += int.from_bytes(header[152:160], "little")
    return used / entries


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=int, nargs="+", default=[200, 2000], metavar="LINES_PER_SECOND")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rehearse", action="store_true", help="200 lines/s for 3 s, once: does it run at all?"
    )
    parser.add_argument("--rsyslog", type=Path, default=Path("/"), metavar="FOLDER")
    parser.add_argument("--sizes", type=Path, metavar="FILE")
    parser.add_argument(
        "--documents", type=int, default=20_000, metavar="N", help="of each stream, with --sizes"
    )
    given = parser.parse_args()
    if given.rehearse:
        given.rates, given.seconds, given.rounds, given.documents = [200], 3, 1, 500
    return sizes(given) if given.sizes else delays(given)


if __name__ == "__main__":
    sys.exit(main())
