"""A journald of our own, and Filebeat with the role's processors, for benchmarks of logs; as root."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from log_lines import SHIP
from stand import ROOT

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
BULK = 400  # as in roles/filebeat


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


def ended(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(60)
