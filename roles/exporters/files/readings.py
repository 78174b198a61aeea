#!/usr/bin/python3
"""readings.py FILE: what the node exporter cannot see itself, in Prometheus' text format; replaced atomically.

Ends of certificates and of the revocation list, failed units, time servers, whether a newer kernel waits for a reboot, files
that are not what the last run wrote, the last backup, whether Prometheus runs where it should, and which of the addresses that
edges share this host has, the last login of the break-glass account.
On the control node also the bundle's serial and age, the serial that was applied last, when bundle, releases and images end,
the last verification, open vulnerabilities and the age of their databases, volumes' recovery keys and their drills, the time of
the witness's last look, the newest heads that it has, and the alterations that it found; when logs were last compared, and what
was missing. Where logs are kept the time of their last snapshot, and when their space is used up as they grow.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from ipaddress import IPv6Address, ip_address
from pathlib import Path

PKI = Path("/etc/llmkeep/pki")
CERTIFICATES = ("host.pem", "edge.pem", "public.pem", "issuing.pem", "root.pem")
REVOCATIONS = "crl.pem"
PROMETHEUS = Path("/etc/prometheus/client.yml")  # by role prometheus
WATCHING = ("prometheus.service", "prometheus-alertmanager.service")
KEEPALIVED = Path("/etc/keepalived/keepalived.conf")
NETWORK = Path("/proc/self/net")
CHRONY = Path("/etc/chrony/chrony.conf")
BOOT = Path("/boot")
SERIAL = Path("/var/lib/llmkeep/serial")
BUNDLE = Path("/srv/llmkeep/bundle/current/MANIFEST.json")
SIGNED = {"release": "/srv/llmkeep/releases/*/MANIFEST.json", "image": "/srv/llmkeep/images/*/image.json"}
WITNESS = Path("/var/lib/llmkeep/witness")
WITNESS_OF_PODS = Path("/var/lib/llmkeep/witness-pods")
LOOK = WITNESS / "findings.json"
LOGS = Path("/var/lib/llmkeep/logs-check.json")
KEPT = Path("/var/lib/llmkeep-logs/kept.json")  # by elasticsearch-keep
APPLIED = Path("/var/lib/llmkeep/applied.json")  # these two are of llmkeep/record/runs.py
VERIFIED = Path("/var/lib/llmkeep/verified.json")
VULNERABLE = Path("/var/lib/llmkeep/vulnerable.json")
# As llmkeep/bundle/databases.py names their files.
DATABASES = {"debian": "debian.json", "npm": "npm.zip", "pypi": "pypi.zip"}
VOLUMES = Path("/var/lib/llmkeep/storage")  # the register of llmkeep.estate.luks_escrow
RECORD = Path("/var/log/llm-audit")
BREAKGLASS = Path("/var/lib/llmkeep-breakglass/login")  # touched by role operators at each login
BACKUP = Path("/var/lib/llmkeep-backup/done")  # whatever backs up a host's record touches it when it is done
BACKUP_VERIFIED = Path("/var/lib/llmkeep/backup-verified.json")  # by `llmkeep backup verify`
# By llmkeep.estate.config_tree: files as the last run left them.
WRITTEN = Path("/var/lib/llmkeep-written/sha256.json")
LARGEST = 32 << 20  # bytes, more than any file that a role writes: this program may take 128 MiB


def output_of(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout


def end(kind: str, path: Path, option: str) -> str:
    """Seconds since 1970 at which a certificate or a revocation list ends."""
    output = output_of("openssl", kind, "-in", str(path), "-noout", option, "-dateopt", "iso_8601")
    return f"{datetime.fromisoformat(output.strip().partition('=')[2]).timestamp():.0f}"


def certificates() -> Iterator[str]:
    for path in (PKI / name for name in CERTIFICATES):
        if path.exists():
            yield f'llmkeep_certificate_expiry_seconds{{path="{path}"}} {end("x509", path, "-enddate")}'
    if (path := PKI / REVOCATIONS).exists():
        yield f"llmkeep_revocation_list_expiry_seconds {end('crl', path, '-nextupdate')}"


def failed_units() -> Iterator[str]:
    for line in output_of(
        "systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"
    ).splitlines():
        yield f"llmkeep_unit_failed{{unit={quoted(line.split()[0])}}} 1"  # as dev-disk-by\x2duuid.swap


def watching() -> Iterator[str]:
    for unit in WATCHING if PROMETHEUS.exists() else ():
        state = output_of("systemctl", "show", "--property=ActiveState", "--value", unit).strip()
        yield f'llmkeep_watching{{unit="{unit}"}} {int(state == "active")}'


def virtual_addresses() -> Iterator[str]:
    """Of addresses that move between edges. /proc has those of this host, since this unit may open no socket to ask for them."""
    if not KEEPALIVED.exists():
        return
    own = set(re.findall(r"-- (\S+)\n +/32 host LOCAL", (NETWORK / "fib_trie").read_text()))
    if (six := NETWORK / "if_inet6").exists():
        own |= {str(IPv6Address(bytes.fromhex(line.split()[0]))) for line in six.read_text().splitlines()}
    for addresses in re.findall(r"virtual_ipaddress\w* \{([^}]*)\}", KEEPALIVED.read_text()):
        for address in map(str, map(ip_address, addresses.split())):
            yield f'llmkeep_virtual_address{{address="{address}"}} {int(address in own)}'


def clock() -> Iterator[str]:
    if CHRONY.exists():
        servers = [line for line in CHRONY.read_text().splitlines() if line.startswith("server ")]
        yield f"llmkeep_clock_sources {len(servers)}"


def kernel() -> Iterator[str]:
    """Whether a host that boots its own kernel has a newer one than it runs."""
    running = os.uname().release
    there = [path.name.removeprefix("vmlinuz-") for path in BOOT.glob("vmlinuz-*")]
    if running in there:
        newest = subprocess.run(
            ["sort", "-V"], input="\n".join(there), capture_output=True, text=True, check=True
        )
        yield f"llmkeep_newer_kernel {int(newest.stdout.split()[-1] != running)}"


def last_change(path: Path) -> str:
    """Seconds since 1970 at which a file was written; 0 for one that is not there."""
    return f"{path.stat().st_mtime:.0f}" if path.exists() else "0"


def breakglass() -> Iterator[str]:
    if BREAKGLASS.exists():
        yield f"llmkeep_breakglass_login_seconds {last_change(BREAKGLASS)}"


def quoted(value: str) -> str:
    """A label's value."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def drifted_files() -> Iterator[str]:
    """Files that were changed or removed since the last run wrote them, but for those that take a capability to read."""
    if not WRITTEN.exists():
        return
    for name, written in sorted(json.loads(WRITTEN.read_bytes()).items()):
        try:
            with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                same = size <= LARGEST and hashlib.sha256(file.read(size + 1) or b"").hexdigest() == written
        except PermissionError:
            continue
        except OSError:
            same = False
        if not same:
            yield f"llmkeep_drifted_file{{path={quoted(name)}}} 1"


def backup() -> Iterator[str]:
    """The last backup of hosts that have what no run can make again: the control node, and where answers are on record.

    A backup of the control node counts once its repository was read again. A host that is both shows the older one.
    """
    made = []
    if SERIAL.exists():
        verified = json.loads(BACKUP_VERIFIED.read_bytes()) if BACKUP_VERIFIED.exists() else {"created": 0}
        made.append(int(verified["created"]))
    if RECORD.exists():
        made.append(int(last_change(BACKUP)))
    if made:
        yield f"llmkeep_backup_seconds {min(made)}"


def seconds(moment: str) -> str:
    """Since 1970, of a time in ISO 8601."""
    return f"{datetime.fromisoformat(moment).timestamp():.0f}"


def volumes() -> Iterator[str]:
    """When each recovery key was made, and tried; a drill of the key before does not count."""
    for path in sorted(VOLUMES.glob("*.json")):
        entry = json.loads(path.read_bytes())
        made, drilled = entry.get("recovery_stored", ""), entry.get("drilled", "")
        label = f"{{volume={quoted(entry['volume'])}}}"
        yield f"llmkeep_volume_recovery_key_seconds{label} {seconds(made) if made else 0}"
        yield f"llmkeep_volume_drill_seconds{label} {seconds(drilled) if drilled and drilled >= made else 0}"


def signed_content() -> Iterator[str]:
    """When bundle, releases and images end: role mirror refuses them then, and so does apt."""
    if BUNDLE.exists():
        bundle = json.loads(BUNDLE.read_bytes())
        yield f"llmkeep_bundle_created_seconds {seconds(bundle['created'])}"
        yield f'llmkeep_content_expiry_seconds{{kind="bundle",name="{bundle["serial"]}"}} {seconds(bundle["expires"])}'
    for kind, pattern in SIGNED.items():
        for path in sorted(Path("/").glob(pattern[1:])):
            name, ends = quoted(path.parent.name), seconds(json.loads(path.read_bytes())["expires"])
            yield f'llmkeep_content_expiry_seconds{{kind="{kind}",name={name}}} {ends}'


def vulnerabilities() -> Iterator[str]:
    """When each database in the bundle was what its source had, 0 for one that is not there; and the last scan's numbers."""
    if BUNDLE.exists():
        purls = {entry["path"]: entry["purl"] for entry in json.loads(BUNDLE.read_bytes()).get("files", ())}
        for name, file in DATABASES.items():
            date = purls.get(f"vulnerabilities/{file}", "").rpartition("@")[2]
            yield f'llmkeep_cve_database_seconds{{database="{name}"}} {seconds(date) if date else 0}'
        yield f"llmkeep_cve_seconds {last_change(VULNERABLE)}"
    if VULNERABLE.exists():
        for name, host in json.loads(VULNERABLE.read_bytes())["hosts"].items():
            label = f"host={quoted(name)}"
            yield f"llmkeep_cve_unknown{{{label}}} {host['unknown']}"
            for severity, number in host["open"].items():
                yield f"llmkeep_cve_open{{{label},severity={quoted(severity)}}} {number}"


def control_node() -> Iterator[str]:
    if SERIAL.exists():
        yield f"llmkeep_bundle_serial {int(SERIAL.read_text())}"
        yield f"llmkeep_verify_seconds {last_change(VERIFIED)}"
        applied = json.loads(APPLIED.read_bytes())["serial"] if APPLIED.exists() else 0  # 0: none to its end
        yield f"llmkeep_site_serial {applied}"
    if VERIFIED.exists():
        yield f"llmkeep_verify_failed {json.loads(VERIFIED.read_bytes())['failed']}"
    if LOOK.exists():
        yield f"llmkeep_audit_look_seconds {last_change(LOOK)}"
        yield f"llmkeep_audit_altered {len(json.loads(LOOK.read_bytes())['altered'])}"
    for path in sorted([*WITNESS.glob("*/heads"), *WITNESS_OF_PODS.glob("*/heads")]):
        yield f"llmkeep_audit_head_seconds{{host={quoted(path.parent.name)}}} {last_change(path)}"
    if LOGS.exists():
        yield f"llmkeep_logs_check_seconds {LOGS.stat().st_mtime:.0f}"
        for name, source in json.loads(LOGS.read_bytes())["sources"].items():
            of = f'{{source="{name}"}}'
            missing = sum(gap["missing"] for gap in source["gaps"]) + len(source.get("unread", ()))
            yield f"llmkeep_logs_missing{of} {missing}"
            yield f"llmkeep_logs_duplicates{of} {sum(hour['duplicates'] for hour in source['hours'].values())}"
            yield f"llmkeep_logs_silent{of} {int(source['silent'])}"


def logs() -> Iterator[str]:
    if KEPT.exists():
        record = json.loads(KEPT.read_text())
        for key, name in (("snapshot", "llmkeep_log_snapshot_seconds"), ("full", "llmkeep_log_full_seconds")):
            if record.get(key):
                yield f"{name} {record[key]:.0f}"


def main() -> None:
    path = Path(sys.argv[1])
    fresh = path.with_suffix(".new")
    fresh.write_text(
        "\n".join(
            [
                *certificates(),
                *failed_units(),
                *watching(),
                *virtual_addresses(),
                *clock(),
                *kernel(),
                *drifted_files(),
                *breakglass(),
                *backup(),
                *volumes(),
                *control_node(),
                *signed_content(),
                *vulnerabilities(),
                *logs(),
                "",
            ]
        )
    )
    fresh.replace(path)


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    main()
