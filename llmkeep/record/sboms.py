"""Signed archives of installed software, written by `llmkeep sbom make` on the control node."""

from pathlib import Path

from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmproof.archive import ArchiveRefused
from llmproof.heads import Verifier
from llmproof.sbom import Sbom, verified

TIME = "%Y%m%dT%H%M%S.%f"  # in names, which therefore sort by it


def paths(places: Places) -> list[Path]:
    """The archives that are here, the oldest first."""
    return sorted(places.sboms.glob("sbom-*.tar"))


def opened(path: Path, verifier: Verifier) -> Sbom:
    """An archive that verifies; LlmkeepError with the reason for any other."""
    try:
        return verified(path.read_bytes(), verifier)[0]
    except ArchiveRefused as error:
        raise LlmkeepError(f"{path}: {error}") from error


def named(places: Places, name: str | None) -> Path:
    """An archive by its path, or by its name here; the newest one without. LlmkeepError where there is none."""
    if name:
        path = Path(name) if Path(name).exists() else places.sboms / name
        if not path.exists():
            raise LlmkeepError(
                f"there is no {name}, neither here nor in {places.sboms}: choose one from `llmkeep sbom list`"
            )
        return path
    if not (every := paths(places)):
        raise LlmkeepError(f"{places.sboms} has no SBOM yet: make one with `llmkeep sbom make`")
    return every[-1]
