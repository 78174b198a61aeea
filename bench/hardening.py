#!/usr/bin/env python3
"""Counts the rules of ANSSI-BP-028 and CIS that a lab host passes with OpenSCAP, and computes its lynis index; names failed
rules.

    make peers PEER=openscap
    bench/hardening.py llm1 --instance kernel -i inventory/lab/hosts.yml -i inventory/lab-kernel
    bench/hardening.py llm1 --datastream ssg-debian13-ds.xml --profile cis_level1_server

Programs and rules are copied to the host's /run in one archive, and removed afterwards. Debian's content (ssg-debian) ends with
Debian 12, so OpenSCAP alone sees release files of version 12, in a separate mount namespace. Content for 13 is built from
the source of ComplianceAsCode. Percent is pass / (pass + fail); rules that do not apply to the host are counted, and unchecked
rules are named.
"""

import argparse
import collections
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEBIAN_12 = Path("/usr/share/xml/scap/ssg/content/ssg-debian12-ds.xml")
PROFILES = ["anssi_bp28_minimal", "anssi_bp28_intermediary", "anssi_bp28_enhanced"]
PLACE = "/run/llmkeep-bench"
LOADER = re.compile(r"/(libc|libm|libpthread|ld-linux[^/]*)[.]so")
RESULT = re.compile(
    r"^Rule\s+xccdf_org[.]ssgproject[.]content_rule_(\S+)\n(?:(?!Rule\s).*\n)*?Result\s+(\w+)", re.MULTILINE
)
AS_DEBIAN_12 = """
sed 's/13/12/g; s/trixie/bookworm/g' /usr/lib/os-release > os-release; echo 12.12 > debian_version
mount --bind os-release /usr/lib/os-release; mount --bind debian_version /etc/debian_version
"""
# Rules about a machine's kernel apply where this package is; the lab's kernels come without one.
WITH_KERNEL = """
cp /var/lib/dpkg/status status
cat >> status <<END

Package: linux-base
Status: install ok installed
Architecture: all
Version: 4.12
Maintainer: lab
Description: none
END
mount --bind status /var/lib/dpkg/status
"""
SCAN = f"""set -e; cd {PLACE}
if [ "$3" = kernel ]; then {WITH_KERNEL} fi
if [ "$2" = 12 ]; then {AS_DEBIAN_12} fi
export LD_LIBRARY_PATH={PLACE}/lib OSCAP_SCHEMA_PATH={PLACE}/openscap/schemas
export OSCAP_XSLT_PATH={PLACE}/openscap/xsl OSCAP_CPE_PATH={PLACE}/openscap/cpe
./oscap xccdf eval --profile xccdf_org.ssgproject.content_profile_"$1" ds.xml 2>&1 || test $? = 2
"""
LYNIS = f"""cd {PLACE}/lynis; chown -R root:root .
./lynis audit system --quick --no-colors --logfile /dev/null --report-file {PLACE}/report.dat < /dev/null > {PLACE}/lynis.log 2>&1
status=$?
rm --force /run/lynis.pid
[ "$status" = 0 ] || tail --lines=5 {PLACE}/lynis.log >&2
cat {PLACE}/report.dat
exit "$status"
"""


def archive(datastream: Path) -> bytes:
    """oscap with its libraries, its schemas, the rules and lynis, as tar."""
    libraries = {
        Path(words[2])
        for line in subprocess.run(
            ["ldd", "/usr/bin/oscap"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        if len(words := line.split()) > 2 and words[2].startswith("/") and not LOADER.search(words[2])
    }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
        tar.add("/usr/bin/oscap", "oscap")
        tar.add(datastream, "ds.xml")
        tar.add("/usr/share/openscap", "openscap")
        for each in sorted(libraries):
            tar.add(each, f"lib/{each.name}")
        tar.add("/usr/share/lynis", "lynis")
        tar.add("/usr/sbin/lynis", "lynis/lynis")
        tar.add("/etc/lynis/default.prf", "lynis/default.prf")
        tar.add("/etc/lynis/plugins", "lynis/plugins")
        for name, script in (("scan", SCAN), ("look", LYNIS)):
            entry = tarfile.TarInfo(name)
            entry.size = len(script)
            tar.addfile(entry, io.BytesIO(script.encode()))
    return file.getvalue()


def on_host(words: argparse.Namespace, command: str, data: bytes = b"") -> str:
    """Output of a command on the host. Ends the program where it fails."""
    inventories = [part for each in words.inventory or ["inventory/lab/hosts.yml"] for part in ("-i", each)]
    lab = [str(ROOT / ".venv/bin/lab"), "--instance", words.instance, *inventories]
    done = subprocess.run(
        [*lab, "exec", words.host, "--", command], input=data, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(
            f"{words.host}: {command[:60]}… ended with {done.returncode}: {(done.stdout + done.stderr).decode()[-800:]}"
        )
    return done.stdout.decode(errors="replace")


def scanned(words: argparse.Namespace, profile: str) -> dict[str, list[str]]:
    """Rules by result."""
    release = 12 if words.datastream == DEBIAN_12 else 13
    text = on_host(
        words, f"unshare --mount sh {PLACE}/scan {profile} {release} {'kernel' if words.kernel else ''}"
    )
    rules: dict[str, list[str]] = collections.defaultdict(list)
    for name, result in RESULT.findall(text):
        rules[result].append(name)
    return rules


def lynis(words: argparse.Namespace) -> tuple[int, list[tuple[str, str]]]:
    """The index, and the tests that suggest something."""
    report = on_host(words, f"sh {PLACE}/look")
    (index,) = re.findall(r"^hardening_index=(\d+)$", report, re.MULTILINE)
    return int(index), re.findall(r"^(?:suggestion|warning)\[\]=([^|]+)\|([^|]*)", report, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", help="of the lab, running")
    parser.add_argument(
        "-i", "--inventory", action="append", help="as the lab's (default: inventory/lab/hosts.yml)"
    )
    parser.add_argument("--instance", default="lab", help="of the lab (default: lab)")
    parser.add_argument(
        "--datastream", type=Path, default=DEBIAN_12, help="rules (default: Debian's, for Debian 12)"
    )
    parser.add_argument("--profile", action="append", help=f"of the rules (default: {', '.join(PROFILES)})")
    parser.add_argument("--kernel", action="store_true", help="apply rules about a machine's kernel, too")
    parser.add_argument("--json", action="store_true", help="all results, by profile")
    words = parser.parse_args()
    if not words.datastream.exists():
        sys.exit(f"{words.datastream} is not there: make peers PEER=openscap")
    on_host(
        words, f"mkdir --mode=0700 {PLACE} && tar --extract --directory={PLACE}", archive(words.datastream)
    )
    try:
        scans = {profile: scanned(words, profile) for profile in words.profile or PROFILES}
        index, suggestions = lynis(words)
    finally:
        on_host(words, f"rm -r {PLACE}")
    if words.json:
        print(json.dumps({"rules": scans, "lynis": {"index": index, "suggestions": suggestions}}, indent=1))
        return
    for profile, rules in scans.items():
        passed, failed = len(rules["pass"]), sorted(rules["fail"])
        whole = passed + len(failed)
        print(
            f"{profile}: {passed} of {whole}, {100 * passed / max(whole, 1):.1f} %; {len(rules['notapplicable'])} do not apply"
        )
        for result in sorted(set(rules) - {"pass", "notapplicable"}):
            print(f"  {result}: {', '.join(sorted(rules[result]))}")
    print(f"lynis: index {index}, {len(suggestions)} suggestions")
    for test, text in suggestions:
        print(f"  {test}: {text}")


if __name__ == "__main__":
    main()
