"""A host's list of installed software. It is untrusted: checked, escaped and bounded before anything uses it."""

import json
import re
from dataclasses import dataclass
from typing import Any

from llmkeep.bundle.manifest import SHA256

MOST, LONGEST = 200_000, 4096  # rows of a host, characters of a text
# dpkg itself takes no others, so an answer with others is not its.
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{0,126}")
VERSION = re.compile(r"[A-Za-z0-9.+~:-]{1,256}")
ARCHITECTURE = re.compile(r"[a-z0-9-]{1,32}")
WIDTHS = {"packages": 5, "python": 5, "programs": 2, "scripts": 2, "models": 2, "modules": 3}


@dataclass(frozen=True)
class Package:
    """A Debian package, with its source package."""

    name: str
    version: str
    architecture: str
    source: str
    source_version: str


@dataclass(frozen=True)
class Distribution:
    """A Python distribution.

    `record`: SHA-256 of the part of its record shared with the wheel's, empty if it has none. `package`: the Debian
    package from whose wheel it was unpacked.
    """

    name: str
    version: str
    place: str
    record: str
    package: str = ""


@dataclass(frozen=True)
class File:
    """A program, a script or a kernel module; or a model, by the SHA-256 of its checksums, empty if it has none.

    `package`: the source of a kernel module.
    """

    path: str
    sha256: str
    package: str = ""


@dataclass(frozen=True)
class Answer:
    """One host's software; `skipped`: places that were not searched."""

    packages: list[Package]
    python: list[Distribution]
    programs: list[File]
    scripts: list[File]
    models: list[File]
    modules: list[File]
    loaded: list[str]
    skipped: list[str]


def read(text: str) -> Answer:
    """Parse the output of module installed_components; ValueError for anything else."""
    try:
        document = json.loads(text)
        rows = {name: _rows(document[name], width) for name, width in WIDTHS.items()}
        loaded, skipped = (_texts(document[name] or []) for name in ("loaded", "skipped"))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    packages = [Package(*row) for row in rows["packages"]]
    for each in packages:
        for pattern, value in (
            (PACKAGE, each.name), (VERSION, each.version), (ARCHITECTURE, each.architecture),
            (PACKAGE, each.source), (VERSION, each.source_version),
        ):  # fmt: skip
            if not pattern.fullmatch(value):
                raise ValueError(f"{value!r:.120} is not a name or version of dpkg")
    if not packages:
        raise ValueError("it has no package according to dpkg")
    files = {
        name: [_file(*row) for row in rows[name]] for name in ("programs", "scripts", "models", "modules")
    }
    python = [
        Distribution(name, version, place, _digest(record), package)
        for name, version, place, record, package in rows["python"]
    ]
    return Answer(packages=packages, python=python, loaded=loaded, skipped=skipped, **files)


def _file(path: str, sha256: str, package: str = "") -> File:
    return File(path, _digest(sha256), package)


def _digest(text: str) -> str:
    if text and not SHA256.fullmatch(text):
        raise ValueError(f"{text!r:.120} is not a SHA-256")
    return text


def _rows(value: Any, width: int) -> list[list[str]]:
    if not isinstance(value, list) or len(value) > MOST:
        raise ValueError(f"{type(value).__name__} instead of at most {MOST} rows")
    rows = [_texts(row) for row in value]
    if any(len(row) != width for row in rows):
        raise ValueError(f"a row does not have {width} fields")
    return rows


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(
        isinstance(each, str) and len(each) <= LONGEST for each in value
    ):
        raise ValueError(f"{value!r:.120} instead of text of at most {LONGEST} characters")
    return [plain(each) for each in value]


def plain(text: str) -> str:
    """TEXT with all that a terminal, a page or XML could misread escaped, as Python writes it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
