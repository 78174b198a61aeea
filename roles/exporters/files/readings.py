#!/usr/bin/python3
"""readings.py FILE: what the node exporter cannot see itself, in Prometheus' text format; replaced atomically.

Certificates' ends, failed units; on the control node the bundle's serial and the time of the witness's last look.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

PKI = Path("/etc/llmkeep/pki")
CERTIFICATES = ("host.pem", "edge.pem", "issuing.pem", "root.pem")
SERIAL = Path("/var/lib/llmkeep/serial")
LOOK = Path("/var/lib/llmkeep/witness/findings.json")


def said(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout


def certificates() -> Iterator[str]:
    for path in (PKI / name for name in CERTIFICATES):
        if path.exists():
            end = said("openssl", "x509", "-in", str(path), "-noout", "-enddate", "-dateopt", "iso_8601")
            moment = datetime.fromisoformat(end.strip().removeprefix("notAfter="))
            yield f'llmkeep_certificate_expiry_seconds{{path="{path}"}} {moment.timestamp():.0f}'


def failed_units() -> Iterator[str]:
    for line in said(
        "systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"
    ).splitlines():
        yield f'llmkeep_unit_failed{{unit="{line.split()[0]}"}} 1'


def control_node() -> Iterator[str]:
    if SERIAL.exists():
        yield f"llmkeep_bundle_serial {int(SERIAL.read_text())}"
    if LOOK.exists():
        yield f"llmkeep_audit_look_seconds {LOOK.stat().st_mtime:.0f}"


def main() -> None:
    path = Path(sys.argv[1])
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join([*certificates(), *failed_units(), *control_node(), ""]))
    fresh.replace(path)


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    main()
