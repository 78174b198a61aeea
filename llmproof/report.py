"""A signed report: what checks observed on hosts, and which controls of a standard that shows.

It is a tar archive that the same files always make alike: the report's files, then `files` with a line `SHA256  NAME` for each,
then `signature`: a signed head (heads.py) over the lines of `files`, by the key of the control node's record under another name.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from llmproof.heads import Head, HeadError, Signer, Tree, Verifier

PURPOSE = "report"
RESULTS, VERDICTS, FILES, SIGNATURE = "results.json", "verdicts.json", "files", "signature"
LIMIT = 256 * 1024 * 1024  # bytes of an archive
FORMAT = 1
# A control's verdicts. Only the first says that a control is met.
MET, PARTLY, NOT_MET, NOT_SHOWN, MISSING, ORGANISATION, UNREVIEWED = VERDICT_NAMES = (
    "met", "partly", "not met", "not shown", "no check", "organisation", "unreviewed",
)  # fmt: skip
# States of a check on a host. `undeclared`: the host's settings do not ask for it.
OK, FAILED, UNDECLARED = "ok", "failed", "undeclared"
STATES = frozenset({OK, FAILED, "accepted", "error", "not enforceable"})
SKIPPED = "skipped"


class ReportRefused(Exception):
    """The archive is not as it was signed, or says what it cannot say. The message names the place."""


@dataclass(frozen=True)
class Report:
    """A verified report. `head`: over its files, with the time of its signature."""

    results: dict[str, Any]
    verdicts: list[dict[str, Any]]
    files: dict[str, bytes]
    head: Head
    verifier: str

    def counts(self) -> dict[str, int]:
        """The number of controls by verdict, each verdict named."""
        return {name: sum(each["verdict"] == name for each in self.verdicts) for name in VERDICT_NAMES}


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each control its verdict, and the state of each of its checks on each host that has the check's role.

    KeyError, TypeError and AttributeError where RESULTS is no such document.
    """
    conditional = {*results["conditional"]}
    verdicts = []
    for control in results["standard"]["controls"]:
        rows = [
            {"check": check, "host": name, "state": state}
            for check in control.get("checks", [])
            for name, host in sorted(results["hosts"].items())
            if check.split(".")[0] in host["roles"]
            for state in _states(check, host, conditional)
        ]
        verdict = _verdict(
            control, {row["state"] for row in rows}, bool(results["standard"].get("unreviewed"))
        )
        verdicts.append({"control": control["id"], "verdict": verdict, "checks": rows})
    return verdicts


def _states(check: str, host: dict[str, Any], conditional: set[str]) -> list[str]:
    observed = [each["state"] for each in host["checks"] if each["id"] == check]
    if not observed and check in conditional and check.split(".")[0] in host["verified"]:
        return [UNDECLARED]
    return [state if state in STATES else "error" for state in observed] or [SKIPPED]


def _verdict(control: dict[str, Any], states: set[str], unreviewed: bool) -> str:
    if unreviewed:
        return UNREVIEWED
    if control.get("organisation"):
        return ORGANISATION
    if not control.get("checks"):
        return MISSING
    if FAILED in states:
        return NOT_MET
    if OK not in states or states - {OK, UNDECLARED}:
        return NOT_SHOWN
    return PARTLY if control.get("partly") else MET


def packed(files: dict[str, bytes], signer: Signer, time: datetime) -> bytes:
    """The archive of FILES, in their order, signed at TIME (UTC)."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}".encode() for name, content in files.items()]
    head = Head(len(lines), _root(lines), time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    return _tar({**files, FILES: b"".join(line + b"\n" for line in lines), SIGNATURE: signer.sign(head)})


def verified(archive: bytes, verifier: Verifier) -> Report:
    """The report in ARCHIVE; ReportRefused unless each byte is as the owner of the record's key VERIFIER signed it.

    Its verdicts are those that follow from its results.
    """
    files = _unpacked(archive)
    names = list(files)
    if names[-2:] != [FILES, SIGNATURE]:
        raise ReportRefused(f"it does not end with {FILES} and {SIGNATURE}, so nothing in it is signed")
    try:
        head = verifier.scoped(PURPOSE).open(files[SIGNATURE])
    except HeadError as error:
        raise ReportRefused(f"{SIGNATURE}: {error}") from error
    lines = files[FILES].removesuffix(b"\n").split(b"\n")
    if (head.size, head.root) != (len(lines), _root(lines)):
        raise ReportRefused(f"{FILES} is not what was signed, or the signature is another report's")
    parts = [line.decode(errors="replace").partition("  ") for line in lines]
    signed = {name: digest for digest, _, name in parts}
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in names[:-2]}
    for name, digest in signed.items():
        if name not in digests:
            raise ReportRefused(f"{name} is missing: it was signed, and taken out")
        if digests[name] != digest:
            raise ReportRefused(f"{name} has SHA-256 {digests[name]}, signed was {digest}")
    if more := sorted(digests.keys() - signed.keys()):
        raise ReportRefused(f"{more[0]} was not signed: it was put in")
    if names[:-2] != list(signed):
        raise ReportRefused(f"its files are in another order than signed: {', '.join(names[:-2])}")
    if _tar(files) != archive:
        raise ReportRefused("its files are as signed, and the bytes around them are not those of a report")
    return _consistent(files, head, verifier)


def _consistent(files: dict[str, bytes], head: Head, verifier: Verifier) -> Report:
    try:
        results, verdicts = json.loads(files[RESULTS]), json.loads(files[VERDICTS])
        if results["format"] != FORMAT:
            raise ReportRefused(f"it has format {results['format']}, and this program reads {FORMAT}")
        if judged(results) != verdicts:
            raise ReportRefused(f"{VERDICTS} does not follow from {RESULTS}")
        verifier.open(results["record_head"].encode())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ReportRefused(f"it is signed, and no report ({type(error).__name__}: {error})") from error
    except HeadError as error:
        raise ReportRefused(f"the head of the record in {RESULTS}: {error}") from error
    return Report(results, verdicts, files, head, verifier.text)


def _root(lines: list[bytes]) -> bytes:
    tree = Tree()
    for line in lines:
        tree.add(line)
    return tree.root()


def _tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _unpacked(archive: bytes) -> dict[str, bytes]:
    """Files by name in their order, unverified."""
    if len(archive) > LIMIT:
        raise ReportRefused(f"it has {len(archive)} bytes; no report has more than {LIMIT}")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                # A sparse file is read with all its holes, however large.
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or member.name in files:
                    raise ReportRefused(f"{member.name[:200]!r} is there twice, or is no plain file")
                files[member.name] = content.read()
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise ReportRefused(f"it is no archive, or a torn one ({error})") from error
    return files
