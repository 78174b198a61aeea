#!/usr/bin/python3
"""readings.py FILE: what the node exporter cannot see itself, in Prometheus' text format; replaced atomically.

Ends of certificates and of the revocation list, failed units, time servers; on the control node the bundle's serial,
the time of the witness's last look, and the alterations that it found; when logs were last compared, and what was missing; where logs
are kept the time of their last snapshot, and when their space is used up as they grow.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

PKI = Path("/etc/llmkeep/pki")
CERTIFICATES = ("host.pem", "edge.pem", "issuing.pem", "root.pem")
REVOCATIONS = "crl.pem"
CHRONY = Path("/etc/chrony/chrony.conf")
SERIAL = Path("/var/lib/llmkeep/serial")
LOOK = Path("/var/lib/llmkeep/witness/findings.json")
LOGS = Path("/var/lib/llmkeep/logs-check.json")
KEPT = Path("/var/lib/llmkeep-logs/kept.json")  # by elasticsearch-keep


def said(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout


def end(kind: str, path: Path, option: str) -> str:
    """Seconds since 1970 at which a certificate or a revocation list ends."""
    told = said("openssl", kind, "-in", str(path), "-noout", option, "-dateopt", "iso_8601")
    return f"{datetime.fromisoformat(told.strip().partition('=')[2]).timestamp():.0f}"


def certificates() -> Iterator[str]:
    for path in (PKI / name for name in CERTIFICATES):
        if path.exists():
            yield f'llmkeep_certificate_expiry_seconds{{path="{path}"}} {end("x509", path, "-enddate")}'
    if (path := PKI / REVOCATIONS).exists():
        yield f"llmkeep_revocation_list_expiry_seconds {end('crl', path, '-nextupdate')}"


def failed_units() -> Iterator[str]:
    for line in said(
        "systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"
    ).splitlines():
        unit = line.split()[0].replace("\\", "\\\\")  # as in dev-disk-by\x2duuid.swap
        yield f'llmkeep_unit_failed{{unit="{unit}"}} 1'


def clock() -> Iterator[str]:
    if CHRONY.exists():
        servers = [line for line in CHRONY.read_text().splitlines() if line.startswith("server ")]
        yield f"llmkeep_clock_sources {len(servers)}"


def control_node() -> Iterator[str]:
    if SERIAL.exists():
        yield f"llmkeep_bundle_serial {int(SERIAL.read_text())}"
    if LOOK.exists():
        yield f"llmkeep_audit_look_seconds {LOOK.stat().st_mtime:.0f}"
        yield f"llmkeep_audit_altered {len(json.loads(LOOK.read_bytes())['altered'])}"
    if LOGS.exists():
        yield f"llmkeep_logs_check_seconds {LOGS.stat().st_mtime:.0f}"
        for name, source in json.loads(LOGS.read_bytes())["sources"].items():
            of = f'{{source="{name}"}}'
            yield f"llmkeep_logs_missing{of} {sum(gap['missing'] for gap in source['gaps'])}"
            yield f"llmkeep_logs_duplicates{of} {sum(hour['duplicates'] for hour in source['hours'].values())}"
            yield f"llmkeep_logs_silent{of} {int(source['silent'])}"


def logs() -> Iterator[str]:
    if KEPT.exists():
        kept = json.loads(KEPT.read_text())
        for key, name in (("snapshot", "llmkeep_log_snapshot_seconds"), ("full", "llmkeep_log_full_seconds")):
            if kept.get(key):
                yield f"{name} {kept[key]:.0f}"


def main() -> None:
    path = Path(sys.argv[1])
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join([*certificates(), *failed_units(), *clock(), *control_node(), *logs(), ""]))
    fresh.replace(path)


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    main()
