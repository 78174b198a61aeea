"""What the timer reads of a host, as Prometheus' own parser takes it."""

import hashlib
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from plugin_modules import ROOT

READINGS = (ROOT / "roles/exporters/files/readings.py").read_text()
UNIT = r"dev-disk-by\x2duuid.swap"
END = datetime(2030, 1, 31, 8, tzinfo=UTC)


def read(folder: Path) -> list[str]:
    """Lines of a run on a host whose files lie in FOLDER, and where UNIT failed."""
    program = folder / "systemctl"
    program.write_text(
        f"#!/bin/sh\n[ $1 = show ] && cat {folder}/$4 || printf '%s loaded failed failed Swap\\n' '{UNIT}'\n"
    )
    program.chmod(0o755)
    text = READINGS
    kept_by_name = ("backup", "breakglass", "logs", "written")
    for place in (
        *("/etc/llmkeep/pki", "/etc/chrony", "/etc/keepalived", "/etc/prometheus", "/proc/self/net"),
        *(f"/var/lib/llmkeep-{name}" for name in kept_by_name),
    ):
        text = text.replace(place, str(folder))
    text = text.replace("/srv/llmkeep", f"{folder}/srv").replace('Path("/boot")', f'Path("{folder}/boot")')
    text = text.replace("/var/lib/llmkeep-logs", f"{folder}-logs")
    text = text.replace("/var/lib/llmkeep/", f"{folder}/").replace("/var/log/llm-audit", f"{folder}/record")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    (folder / "readings.py").write_text(text)
    subprocess.run(
        ["python3.13", folder / "readings.py", folder / "llmkeep.prom"], check=True, env=environment
    )
    return (folder / "llmkeep.prom").read_text().splitlines()


def test_the_last_login_of_the_break_glass_account_is_shown(tmp_path: Path) -> None:
    (tmp_path / "login").touch()
    os.utime(tmp_path / "login", (1000, 1000))
    assert "llmkeep_breakglass_login_seconds 1000" in read(tmp_path)


def test_a_unit_with_a_backslash_in_its_name_leaves_the_file_one_that_prometheus_reads(
    tmp_path: Path,
) -> None:
    lines = read(tmp_path)
    assert lines == [r'llmkeep_unit_failed{unit="dev-disk-by\\x2duuid.swap"} 1']
    judged = subprocess.run(
        ["promtool", "check", "metrics"],
        input="\n".join([*lines, ""]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "error while linting" not in judged.stderr


@pytest.mark.parametrize(
    ("text", "number"), [("local stratum 8\n", 0), ("server 10.0.0.1 iburst\nserver 10.0.0.2\nport 0\n", 2)]
)
def test_time_servers_are_counted(text: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "chrony.conf").write_text(text)
    assert f"llmkeep_clock_sources {number}" in read(tmp_path)


def test_addresses_that_move_between_edges_are_told_with_whether_this_host_has_them(tmp_path: Path) -> None:
    (tmp_path / "keepalived.conf").write_text(
        "vrrp_instance edge {\n    virtual_ipaddress {\n        10.0.0.9\n        10.0.0.8\n    }\n"
        "    virtual_ipaddress_excluded {\n        fd00::9\n    }\n}\n"
    )
    (tmp_path / "fib_trie").write_text(
        "Local:\n     |-- 10.0.0.9\n        /32 host LOCAL\n     |-- 10.0.0.80\n"
    )
    (tmp_path / "if_inet6").write_text("fd000000000000000000000000000009 02 80 00 80     vec0\n")
    assert [line for line in read(tmp_path) if "virtual" in line] == [
        'llmkeep_virtual_address{address="10.0.0.9"} 1',
        'llmkeep_virtual_address{address="10.0.0.8"} 0',
        'llmkeep_virtual_address{address="fd00::9"} 1',
    ]


def test_the_end_of_the_first_revocation_list_is_read(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())

    def revocations(end: datetime) -> bytes:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuing")])
        built = x509.CertificateRevocationListBuilder(name, end - timedelta(days=30), end)
        return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    (tmp_path / "crl.pem").write_bytes(revocations(END) + revocations(END + timedelta(days=99)))
    assert f"llmkeep_revocation_list_expiry_seconds {END.timestamp():.0f}" in read(tmp_path)


def test_ends_of_bundle_releases_and_images_are_read_with_the_age_of_the_bundle(tmp_path: Path) -> None:
    signed = {"serial": 7, "created": "2030-01-01T00:00:00Z", "expires": END.isoformat()}
    for place in ("bundle/current/MANIFEST.json", "releases/tuned-2/MANIFEST.json", "images/edge/image.json"):
        path = tmp_path / "srv" / place
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(signed))
    lines, end = read(tmp_path), f"{END.timestamp():.0f}"
    assert f"llmkeep_bundle_created_seconds {datetime(2030, 1, 1, tzinfo=UTC).timestamp():.0f}" in lines
    assert [line for line in lines if line.startswith("llmkeep_content_expiry_seconds")] == [
        f'llmkeep_content_expiry_seconds{{kind="bundle",name="7"}} {end}',
        f'llmkeep_content_expiry_seconds{{kind="release",name="tuned-2"}} {end}',
        f'llmkeep_content_expiry_seconds{{kind="image",name="edge"}} {end}',
    ]


@pytest.mark.parametrize(("installed", "newer"), [(["99.10.1"], 1), (["0.1"], 0), ([], 0)])
def test_a_newer_kernel_than_the_one_that_runs_is_seen(
    tmp_path: Path, installed: list[str], newer: int
) -> None:
    (tmp_path / "boot").mkdir()
    for name in (os.uname().release, *installed):
        (tmp_path / f"boot/vmlinuz-{name}").touch()
    assert f"llmkeep_newer_kernel {newer}" in read(tmp_path)


def test_a_host_that_is_given_its_kernel_needs_no_reboot(tmp_path: Path) -> None:
    assert not [line for line in read(tmp_path) if "kernel" in line]


def test_alterations_that_are_not_acknowledged_are_counted(tmp_path: Path) -> None:
    found = {"altered": {"1a2b3c4d": "a", "5e6f7a8b": "b"}, "unheard": {"llm1": "c"}}
    (tmp_path / "witness").mkdir()
    (tmp_path / "witness/findings.json").write_text(json.dumps(found))
    assert "llmkeep_audit_altered 2" in read(tmp_path)


def test_what_the_last_comparison_of_logs_found_is_read_by_source(tmp_path: Path) -> None:
    hours = {"2026-11-27T22": {"duplicates": 2}, "2026-11-27T23": {"duplicates": 1}}
    found = {
        "llm1": {"gaps": [{"missing": 4}, {"missing": 1}], "hours": hours, "silent": True, "unread": ["x"]}
    }
    (tmp_path / "logs-check.json").write_text(json.dumps({"sources": found}))
    lines = read(tmp_path)
    assert [line for line in lines if 'source="llm1"' in line] == [
        'llmkeep_logs_missing{source="llm1"} 6',
        'llmkeep_logs_duplicates{source="llm1"} 3',
        'llmkeep_logs_silent{source="llm1"} 1',
    ]
    assert any(line.startswith("llmkeep_logs_check_seconds ") for line in lines)


def test_the_last_snapshot_of_the_logs_is_read_and_when_their_space_is_used_up(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"sizes": [], "snapshot": 1796000000.4, "full": None}))
    assert read(tmp_path)[1:] == ["llmkeep_log_snapshot_seconds 1796000000"]
    kept.write_text(json.dumps({"sizes": [], "snapshot": 1796000000.4, "full": 1.8e9}))
    assert read(tmp_path)[1:] == [
        "llmkeep_log_snapshot_seconds 1796000000",
        "llmkeep_log_full_seconds 1800000000",
    ]


def test_a_host_without_records_or_keys_needs_no_backup(tmp_path: Path) -> None:
    assert not any(line.startswith("llmkeep_backup") for line in read(tmp_path))


def test_the_last_backup_of_a_record_is_when_the_job_touched_its_file(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    assert "llmkeep_backup_seconds 0" in read(tmp_path)
    (tmp_path / "done").touch()
    os.utime(tmp_path / "done", (1700000000, 1700000000))
    assert "llmkeep_backup_seconds 1700000000" in read(tmp_path)


def test_the_last_backup_of_the_control_node_is_the_newest_one_that_was_verified(tmp_path: Path) -> None:
    (tmp_path / "serial").write_text("7\n")
    (tmp_path / "done").touch()
    assert "llmkeep_backup_seconds 0" in read(tmp_path)
    verified = {"snapshot": "1a2b", "created": 1700000000.7, "verified": 1.8e9, "repository": "/srv/backup"}
    (tmp_path / "backup-verified.json").write_text(json.dumps(verified))
    assert "llmkeep_backup_seconds 1700000000" in read(tmp_path)


def test_a_control_node_with_a_record_shows_the_older_of_its_two_backups(tmp_path: Path) -> None:
    (tmp_path / "serial").write_text("7\n")
    (tmp_path / "record").mkdir()
    (tmp_path / "backup-verified.json").write_text('{"created": 1700000000.7}')
    assert "llmkeep_backup_seconds 0" in read(tmp_path)
    (tmp_path / "done").touch()
    os.utime(tmp_path / "done", (1600000000, 1600000000))
    assert [line for line in read(tmp_path) if "backup" in line] == ["llmkeep_backup_seconds 1600000000"]


def test_a_file_that_was_changed_or_removed_since_it_was_written_has_drifted(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("same", "changed", "gone", "link", 'quo"ted')}
    for path in paths.values():
        path.write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "sha256.json").write_text(json.dumps({str(path): digest for path in paths.values()}))
    assert not any(line.startswith("llmkeep_drifted") for line in read(tmp_path))
    for name in ("changed", 'quo"ted'):
        paths[name].write_text("y")
    for name in ("gone", "link"):
        paths[name].unlink()
    paths["link"].symlink_to(paths["same"])
    drifted = sorted(line for line in read(tmp_path) if line.startswith("llmkeep_drifted"))
    names = ["changed", "gone", "link", r"quo\"ted"]
    assert drifted == [f'llmkeep_drifted_file{{path="{tmp_path}/{name}"}} 1' for name in names]


def test_a_file_that_became_larger_than_this_program_may_read_has_drifted(tmp_path: Path) -> None:
    size = (32 << 20) + 1
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    kept = {str(tmp_path / "large"): hashlib.sha256(bytes(size)).hexdigest()}
    (tmp_path / "sha256.json").write_text(json.dumps(kept))
    assert f'llmkeep_drifted_file{{path="{tmp_path}/large"}} 1' in read(tmp_path)


def test_a_host_tells_whether_its_prometheus_runs(tmp_path: Path) -> None:
    (tmp_path / "prometheus.service").write_text("active\n")
    (tmp_path / "prometheus-alertmanager.service").write_text("inactive\n")
    assert not any(line.startswith("llmkeep_watching") for line in read(tmp_path))
    (tmp_path / "client.yml").touch()
    assert [line for line in read(tmp_path) if line.startswith("llmkeep_watching")] == [
        'llmkeep_watching{unit="prometheus.service"} 1',
        'llmkeep_watching{unit="prometheus-alertmanager.service"} 0',
    ]


@pytest.mark.parametrize(
    ("drilled", "counts"),
    [("", 0), ("2023-11-14T22:13:19+00:00", 0), ("2023-11-14T22:13:21+00:00", 1700000001)],
)
def test_a_drill_counts_for_the_key_that_it_tried(drilled: str, counts: int, tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    entry = {"volume": "llm1/data", "recovery_stored": "2023-11-14T22:13:20+00:00", "drilled": drilled}
    (tmp_path / "storage/llm1-data.json").write_text(json.dumps(entry))
    lines = read(tmp_path)
    assert 'llmkeep_volume_recovery_key_seconds{volume="llm1/data"} 1700000000' in lines
    assert f'llmkeep_volume_drill_seconds{{volume="llm1/data"}} {counts}' in lines


def test_the_control_node_tells_what_was_applied_verified_and_witnessed(tmp_path: Path) -> None:
    (tmp_path / "serial").write_text("7\n")
    lines = read(tmp_path)
    never = {f"llmkeep_{name} 0" for name in ("site_serial", "verify_seconds", "backup_seconds")}
    assert {"llmkeep_bundle_serial 7", *never} <= set(lines)
    (tmp_path / "applied.json").write_text('{"serial": 6}')
    (tmp_path / "verified.json").write_text('{"checks": 9, "failed": 2}')
    kept = tmp_path / "witness/llm1/heads", tmp_path / "witness-pods/main.llm-0/heads"
    for path in kept:
        path.parent.mkdir(parents=True)
        path.touch()
    for path in (tmp_path / "verified.json", *kept):
        os.utime(path, (1700000000, 1700000000))
    assert {
        "llmkeep_site_serial 6",
        "llmkeep_verify_failed 2",
        "llmkeep_verify_seconds 1700000000",
        'llmkeep_audit_head_seconds{host="llm1"} 1700000000',
        'llmkeep_audit_head_seconds{host="main.llm-0"} 1700000000',
    } <= set(read(tmp_path))


def test_the_control_node_tells_of_open_vulnerabilities_and_of_databases(tmp_path: Path) -> None:
    bundle = tmp_path / "srv/bundle/current"
    bundle.mkdir(parents=True)
    entry = {"path": "vulnerabilities/debian.json", "purl": "pkg:generic/x@2023-11-14T22:13:20Z"}
    manifest = {"serial": 7, "created": "2023-11-14T22:13:20Z", "expires": "2030-01-01T00:00:00Z"}
    (bundle / "MANIFEST.json").write_text(json.dumps(manifest | {"files": [entry]}))
    lines = set(read(tmp_path))
    assert {
        'llmkeep_cve_database_seconds{database="debian"} 1700000000',
        'llmkeep_cve_database_seconds{database="npm"} 0',
        "llmkeep_cve_seconds 0",
    } <= lines
    scan = {"hosts": {"llm1": {"open": {"critical": 0, "high": 2}, "unknown": 3}}}
    (tmp_path / "vulnerable.json").write_text(json.dumps(scan))
    os.utime(tmp_path / "vulnerable.json", (1700000000, 1700000000))
    assert {
        'llmkeep_cve_open{host="llm1",severity="high"} 2',
        'llmkeep_cve_open{host="llm1",severity="critical"} 0',
        'llmkeep_cve_unknown{host="llm1"} 3',
        "llmkeep_cve_seconds 1700000000",
    } <= set(read(tmp_path))
