"""Databases of known vulnerabilities, of the part `databases` of artifacts.yml: taken whole, as their sources have them.

They change each day, so the lock has the time at which a source had one, and its hash. A source that is not reached is no
failure: the lock keeps what it has, the builder names what a bundle lacks, and `llmkeep cve` calls unknown what that is for.
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
    """A source was not reached, or served something else. The message says which and why, on one line."""


def resolve(sources: Mapping[str, dict[str, str]], old: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The lock's entries for the databases of artifacts.yml, as they are now; of a source that is not reached the old one."""
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
    """The locked databases that can be had, in the cache. The others are printed, with the reason."""
    paths = {}
    for name, entry in sources.items():
        try:
            if name not in locked:
                raise Unavailable(
                    "the lock has none: run `llmkeep lock update --only databases` where its source is reached"
                )
            artifact = locked[name]
            if not cache.has(artifact.sha256, artifact.size):
                digest, _ = _obtained(name, entry, mirror)
                if digest != artifact.sha256:
                    raise Unavailable(f"its source has another one by now, with SHA-256 {digest}: run `llmkeep lock update "
                                      "--only databases`")  # fmt: skip
            paths[name] = cache.intact(artifact.sha256)
        except LlmkeepError as error:
            print(f"bundle: WITHOUT the database of vulnerabilities {name}: {error}", flush=True)
    return paths


def _obtained(name: str, entry: Mapping[str, str], mirror: Path | None) -> tuple[str, datetime]:
    """SHA-256 of a database that lies in the cache now, and when its source had it so. Raises Unavailable.

    MIRROR, or the folder that LLMKEEP_MIRROR names, is looked at first: a file's time is that at which the source had it.
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
        raise Unavailable(f"{uri} is no https address")
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
    """Refuse what is neither, such as a proxy's page for signing in."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as packed:
                packed.getinfo(packed.namelist()[0])
        elif not isinstance(json.loads(path.read_bytes()), dict):
            raise ValueError("no JSON object")
    except (ValueError, IndexError, RecursionError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{uri} served no database ({error})") from error
