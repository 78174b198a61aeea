"""A small audit record, and ways to look at it and to damage it."""

from pathlib import Path

from llmproof import heads
from llmproof.chain import Chain, files
from llmproof.heads import Verifier
from llmproof.verify import Report, verify

SEED = bytes(range(32))
NAME = "llm-audit/test"
UNTIMED = (
    Path(__file__).parent / "untimed_record"
)  # of the version whose heads had no times, by this seed and name


def event(number: int, phase: str = "intent") -> dict[str, object]:
    """What the gateway writes, about so long."""
    return {
        "event.kind": "event",
        "event.category": ["api"],
        "event.action": "POST /v1/chat/completions",
        "event.outcome": "unknown" if phase == "intent" else "success",
        "llmkeep.audit.phase": phase,
        "http.request.id": f"request-{number}",
        "transaction.id": f"transaction-{number}",
        "user.id": "alice@corp",
        "user.roles": ["analyst"],
        "organization.id": "corp",
        "gen_ai.request.model": "smollm2-135m-instruct",
    }


def record(folder: Path, count: int, head_each: int = 10, rotate: int = 1 << 26) -> Path:
    """A record of COUNT lines with a head after each HEAD_EACH."""
    with Chain(folder, SEED, NAME, rotate=rotate) as chain:
        for number in range(1, count + 1):
            chain.append([event((number + 1) // 2, "intent" if number % 2 else "outcome")])
            if number % head_each == 0:
                chain.sign()
    return folder


def verifier(folder: Path) -> Verifier:
    """As an auditor has noted it."""
    return Verifier((folder / "verifier").read_text())


def checked(folder: Path, kept: Path | None = None) -> Report:
    """The verifier's report."""
    return verify(folder, verifier(folder), kept)


def whole(folder: Path) -> list[bytes]:
    """All lines of all files, without their newlines."""
    return [line for path in files(folder) for line in path.read_bytes().split(b"\n")[:-1]]


def put(path: Path, lines: list[bytes]) -> None:
    """Replace a file's lines."""
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def sizes(folder: Path) -> list[int]:
    """What the heads are over."""
    notes, _ = heads.read(folder / heads.NAME)
    return [verifier(folder).open(note).size for note in notes]
