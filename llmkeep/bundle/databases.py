"""Databases of known vulnerabilities (`databases` in artifacts.yml), copied whole from their sources.

They change every day, so the lock has the hash of a database and the time at which its source published it. An
unreachable source is not an error: the lock keeps its entry, the builder prints the databases that a bundle lacks,
and `llmkeep cve` reports the components concerned as unknown.
"""

import json
import os
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from llmkeep.bundle import cache, manifest
from llmkeep.bundle.lock import Artifact
from llmkeep.errors import LlmkeepError

FOLDER = "vulnerabilities"  # of bundles, and of the mirror folder
FILES = {"debian": "debian.json", "pypi": "pypi.zip", "npm": "npm.zip"}
SECONDS = 60  # without a byte
LARGEST = 2 << 30  # bytes
AGENT = "llmkeep"


class Unavailable(LlmkeepError):
    """A source was not reached, or served something else. The message names it and the reason, on one line."""


def resolve(sources: Mapping[str, dict[str, str]], old: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The lock's entries for the current databases of artifacts.yml; the old entry if a source is not reached."""
    entries = {}
    for name, entry in sources.items():
        try:
            digest, moment = _obtained(name, entry, None)
        except Unavailable as reason:
            if name in old:
                entries[name] = old[name]
            print(
                f"{name}: {f'kept as of {old[name].version}' if name in old else 'WITHOUT its database'}: {reason}"
            )
            continue
        version, size = moment.strftime(manifest.TIME), cache.blob(digest).stat().st_size
        purl = f"pkg:generic/{name}-vulnerabilities@{version}"
        entries[name] = Artifact(FILES[name], version, digest, size, entry["licence"], purl)
        print(f"{name}: database of {version}, {size / 1e6:.0f} MB")
    return entries


def find(
    sources: Mapping[str, dict[str, str]], locked: Mapping[str, Artifact], mirror: Path | None
) -> dict[str, Path]:
    """The locked databases that are available, in the cache. The others are printed, with the reason."""
    paths = {}
    for name, entry in sources.items():
        try:
            if name not in locked:
                raise Unavailable(
                    "it is not in the lock: run `llmkeep lock update --only databases` where its source can be reached"
                )
            artifact = locked[name]
            if not cache.has(artifact.sha256, artifact.size):
                digest, _ = _obtained(name, entry, mirror)
                if digest != artifact.sha256:
                    raise Unavailable(f"its source now has another one, with SHA-256 {digest}: run `llmkeep lock update "
                                      "--only databases`")  # fmt: skip
            paths[name] = cache.intact(artifact.sha256)
        except LlmkeepError as error:
            print(f"bundle: WITHOUT the database of vulnerabilities {name}: {error}", flush=True)
    return paths


def _obtained(name: str, entry: Mapping[str, str], mirror: Path | None) -> tuple[str, datetime]:
    """Put a database into the cache; returns its SHA-256 and the time at which its source had it.

    Raises Unavailable. MIRROR, or the folder that LLMKEEP_MIRROR names, is tried first; there, a file's modification
    time is the time at which the source had it.
    """
    mirror = mirror or (Path(folder) if (folder := os.environ.get("LLMKEEP_MIRROR")) else None)
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory(dir=cache.home()) as aside:
        path = Path(aside, FILES[name])
        if mirror and (there := mirror / FOLDER / path.name).is_file():
            shutil.copyfile(there, path)
            moment = datetime.fromtimestamp(there.stat().st_mtime, UTC)
        else:
            moment = _downloaded(entry["uri"], path, now)
        _require_database(path, entry["uri"])
        return cache.put(path), min(moment, now)


def _downloaded(uri: str, path: Path, now: datetime) -> datetime:
    if not uri.startswith("https://"):
        raise Unavailable(f"{uri} is not an https address")
    try:
        request = urllib.request.Request(uri, headers={"User-Agent": AGENT})  # noqa: S310 - https, see above
        trusted = ssl.create_default_context()
        with urllib.request.urlopen(request, timeout=SECONDS, context=trusted) as answer:  # noqa: S310
            with path.open("wb") as file:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    if file.tell() > LARGEST:
                        raise Unavailable(f"{uri} has more than {LARGEST >> 20} MiB")
            changed = answer.headers.get("Last-Modified")
        return parsedate_to_datetime(changed) if changed else now
    except (OSError, ValueError) as error:
        raise Unavailable(f"{uri} was not reached ({getattr(error, 'reason', error)})") from error


def _require_database(path: Path, uri: str) -> None:
    """Refuse other content, such as a proxy's sign-in page."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as packed:
                packed.getinfo(packed.namelist()[0])
        elif not isinstance(json.loads(path.read_bytes()), dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, IndexError, RecursionError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{uri} did not serve a database ({error})") from error
