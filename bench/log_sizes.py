"""Measures the size of each stream's documents in Elasticsearch, its snapshot, the journal and Filebeat's queue; see logs.py."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from log_lines import KINDS, entry
from log_stand import TEMPLATE, ended, filebeat, journal
from stand import ROOT

sys.path.append(str(ROOT / "tests/helpers"))
from search_server import SearchServer, search_server


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
    """The disk space of the files in a folder."""
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
