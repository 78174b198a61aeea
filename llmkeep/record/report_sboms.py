"""What hosts had installed, in a report: the newest SBOM that was made here, as JSON, and its part of the pages."""

from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmkeep.record import sboms
from llmkeep.record.report_html import spoken, table, text
from llmproof.heads import Verifier
from llmproof.sbom import Sbom


def newest(places: Places, verifier: Verifier) -> Sbom | None:
    """The newest SBOM; None where none was made. LlmkeepError for one that was altered."""
    every = sboms.paths(places)
    try:
        return sboms.opened(every[-1], verifier) if every else None
    except LlmkeepError as error:
        raise LlmkeepError(
            f"{error}: save it as evidence, and make another with `llmkeep sbom make`"
        ) from error


def section(bill: Sbom | None, language: str) -> str:
    """The part of a page: a row for each host."""
    say = spoken(language)
    parts = [f"<h2>{say('Installed components')}</h2>"]
    if not bill:
        return "\n".join(
            [*parts, f"<p>{say('No SBOM was made, so it is not known what hosts have installed.')}</p>"]
        )
    summary = bill.summary
    parts.append(
        f"<p>{say('As of')}: {text(summary['ended'])}; {say('Bundle')}: {text(summary['bundle_serial'])}</p>"
    )
    if not bill.complete:
        parts.append(f"<p>{say('A host did not answer, so this is not complete.')}</p>")
    rows = [
        [text(name), str(host["components"]), *("<br>".join(map(text, host[kind])) for kind in ("unknown", "missing")),
         text(host["sha256"]) if host["answers"] else f"{say('did not answer')}: {text(host['problem'])}"]
        for name, host in sorted(summary["hosts"].items())
    ]  # fmt: skip
    heads = ("Host", "Components", "Of no bundle", "Missing", "SHA-256")
    return "\n".join([*parts, table([say(name) for name in heads], rows)])
