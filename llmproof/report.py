"""A signed report: results of checks on hosts, and the controls of a standard that they show. It is a signed archive."""

import json
from dataclasses import dataclass
from typing import Any

from llmproof import archive, sbom
from llmproof.archive import ArchiveRefused
from llmproof.heads import Head, HeadError, Verifier

PURPOSE = "report"
RESULTS, VERDICTS = "results.json", "verdicts.json"
FORMAT = 1
# A control's verdicts. Only the first says that a control is met.
MET, PARTLY, NOT_MET, NOT_SHOWN, MISSING, ORGANISATION, UNREVIEWED = VERDICT_NAMES = (
    "met", "partly", "not met", "not shown", "no check", "organisation", "unreviewed",
)  # fmt: skip
# States of a check on a host. `undeclared`: the host's settings do not ask for it.
OK, FAILED, UNDECLARED = "ok", "failed", "undeclared"
STATES = frozenset({OK, FAILED, "accepted", "error", "not enforceable"})
SKIPPED = "skipped"


@dataclass(frozen=True)
class Report:
    """A verified report. `head`: over its files, with the time of its signature; `installed`: None where no SBOM was made."""

    results: dict[str, Any]
    verdicts: list[dict[str, Any]]
    files: dict[str, bytes]
    head: Head
    verifier: str
    installed: sbom.Sbom | None

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


def reasons(verdicts: list[dict[str, Any]]) -> list[str]:
    """One line per cause of unmet or unshown controls: the verdict, the checks' states, the controls."""
    causes: dict[str, list[str]] = {}
    for each in verdicts:
        if each["verdict"] in (NOT_MET, NOT_SHOWN):
            causes.setdefault(f"{each['verdict']}: {_cause(each['checks'])}", []).append(each["control"])
    return [f"{cause}: {', '.join(controls)}" for cause, controls in causes.items()]


def _cause(rows: list[dict[str, str]]) -> str:
    """The decisive states: an unrequested check counts only if none was requested."""
    states = {row["state"] for row in rows} - {OK}
    decisive = [FAILED] if FAILED in states else sorted(states - {UNDECLARED}) or sorted(states)
    parts = []
    for state in decisive:
        checks: dict[str, list[str]] = {}
        for row in rows:
            if row["state"] == state:
                checks.setdefault(row["check"], []).append(row["host"])
        hosts: dict[str, list[str]] = {}
        for check, names in checks.items():
            hosts.setdefault(", ".join(names), []).append(check)
        parts += [f"{', '.join(checks)} {state} on {names}" for names, checks in hosts.items()]
    return "; ".join(parts) or "no host ran its checks"


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


def verified(content: bytes, verifier: Verifier) -> Report:
    """The report in an archive with this CONTENT; ArchiveRefused unless each byte is as the owner of VERIFIER signed it.

    VERIFIER: the key of the record. The report's verdicts are those that follow from its results.
    """
    files, head = archive.opened(content, verifier.scoped(PURPOSE))
    return _consistent(files, head, verifier)


def _consistent(files: dict[str, bytes], head: Head, verifier: Verifier) -> Report:
    try:
        results, verdicts = json.loads(files[RESULTS]), json.loads(files[VERDICTS])
        if results["format"] != FORMAT:
            raise ArchiveRefused(f"it has format {results['format']}, but this program reads {FORMAT}")
        if judged(results) != verdicts:
            raise ArchiveRefused(f"{VERDICTS} does not follow from {RESULTS}")
        verifier.open(results["record_head"].encode())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArchiveRefused(
            f"it is signed, but is not a report ({type(error).__name__}: {error})"
        ) from error
    except HeadError as error:
        raise ArchiveRefused(f"the head of the record in {RESULTS}: {error}") from error
    components = {name: content for name, content in files.items() if sbom.is_file(name)}
    return Report(
        results, verdicts, files, head, verifier.text, sbom.read(components) if components else None
    )
