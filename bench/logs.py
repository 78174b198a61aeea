#!/usr/bin/env python3
"""Measures the path from a journal line to a searchable document: delay, CPU and memory of Filebeat and, in turns, of rsyslog.

A journald of its own (a namespace) gets lines at a steady rate; each shipper reads the same files of it, and writes to the same
Elasticsearch, the lab's build with 256 MB of heap, over plain HTTP. Each has a disk queue; Filebeat runs the role's processors,
rsyslog (imjournal, omelasticsearch) parses nothing. A line counts as found once a search, repeated every 50 ms, counts as many
documents as were written up to it; Elasticsearch makes documents visible once a second.

--sizes FILE instead measures the size of each stream's documents in Elasticsearch, its snapshot, the journal and Filebeat's
queue, with lines as varied as those of an estate, and writes it to FILE; `llmkeep size` reads that.

Run as root (journald, mount namespaces) by .venv/bin/python, with LLMKEEP_MIRROR set. rsyslog is looked for in --rsyslog, a
folder into which Debian's rsyslog, rsyslog-elasticsearch, libestr0, libfastjson4 and liblognorm5 were unpacked, or /.
Exit code 0, or 1 if a line was not found.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from log_lines import hexadecimal
from log_sizes import sizes
from log_stand import TEMPLATE, Journal, ended, filebeat, journal
from stand import ROOT, cpu_seconds, resident_mb, skip

sys.path.append(str(ROOT / "tests/helpers"))
from search_server import SearchServer, search_server


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


def count(server: SearchServer) -> int:
    status, answer = server.ask("GET", "/logs-llmkeep.system-bench/_count?q=log.syslog.appname:bench")
    return int(answer["count"]) if status == 200 else 0


def one_round(
    server: SearchServer, journal: Journal, shipper: subprocess.Popen[bytes], rate: int, seconds: float
) -> dict[str, float]:
    """Delays of all lines in ms, and CPU and memory of shipper and server."""
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
