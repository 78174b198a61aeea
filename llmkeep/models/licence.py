"""The licence of a model, and its acceptance."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from llmkeep.errors import printable
from llmkeep.models import contents
from llmkeep.models.refusal import LICENCE, ModelRefused

MOST = 64 << 10  # bytes of a card's front matter


@dataclass(frozen=True)
class Licence:
    """`name`: from the model's card, else the first line of the text. `file`: path of the text in the model."""

    name: str
    file: str
    sha256: str


def stated(model: Path, default: str | None = None) -> Licence:
    """The licence that a model states in its card or licence text. `default`: the name stated elsewhere."""
    card = _front_matter(model / contents.CARD)
    name = _name(card) or default
    link = Path(str(card.get("license_link", ""))).name
    texts = sorted(
        (path for path in model.iterdir() if contents.is_licence(path.name) and path.name.upper()[0] in "LC"),
        key=lambda path: (path.name != link, "MODEL" not in path.name.upper(), path.name),
    )
    if not texts and not name:
        raise ModelRefused(
            LICENCE,
            "it states no licence in README.md or LICENSE: give the text with --licence-file",
        )
    text = texts[0] if texts else model / contents.CARD
    if not text.is_file():
        raise ModelRefused(
            LICENCE,
            f"it states the licence {printable(str(name))} but has no text of it: give the text with --licence-file",
        )
    content = text.read_bytes()
    lines = (line.strip(" #*=-\t") for line in content.decode(errors="replace").splitlines())
    return Licence(
        name or next(filter(None, lines), text.name)[:100], text.name, hashlib.sha256(content).hexdigest()
    )


def accepted(licence: Licence, name: str, person: str, moment: str) -> dict[str, Any]:
    """The record of an acceptance; refuses the acceptance of another licence than the model states."""
    if name.strip().casefold() != licence.name.casefold():
        raise ModelRefused(
            LICENCE,
            f"{name!r} was accepted, the model's licence is {printable(licence.name)!r} ({licence.file}, sha256 "
            f"{licence.sha256}): read it, and accept it by this name",
        )
    return {**asdict(licence), "accepted_by": person, "accepted_at": moment}


def _name(card: dict[str, Any]) -> str | None:
    entry = card.get("license_name") or card.get("license")
    names = entry if isinstance(entry, list) else [entry]
    words = [name.strip() for name in names if isinstance(name, str)]
    return " AND ".join(words)[:100] if all(words) and len(words) == len(names) else None


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none."""
    text = card.read_bytes()[:MOST].decode(errors="replace") if card.is_file() else ""
    parts = text.split("\n---", 1)
    if not text.startswith("---") or len(parts) < 2:
        return {}
    try:
        content = yaml.safe_load(parts[0].removeprefix("---"))
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
