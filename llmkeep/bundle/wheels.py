"""Python wheels: resolve an environment of artifacts.yml, and download exactly what the lock says.

A project that publishes only its source is locked as source, and its wheel is built from that.

pip does both; its index, proxy and certificates are those of the machine's own pip settings.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmkeep.bundle import cache
from llmkeep.bundle.lock import Artifact
from llmkeep.errors import LlmkeepError

PIP = [sys.executable, "-m", "pip"]
SAFE = ["--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]


class FetchError(LlmkeepError):
    """Something could not be downloaded; the message carries the client's own reason."""


def resolve(
    requires: list[str],
    constraints: list[str],
    without: Iterable[str],
    alone: bool = False,
    source: bool = False,
) -> dict[str, Artifact]:
    """What pip would install for `requires` into an empty environment, minus the distributions `without`.

    `constraints` are `name==version` of the environment that this one includes. `alone`: as they are, without
    dependencies, and whatever Python their metadata asks for. `source`: as source distributions. Sizes come
    from the downloaded files, which stay in the cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, pins = Path(folder, "report.json"), Path(folder, "constraints.txt")
        pins.write_text("\n".join(constraints))
        _pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--break-system-packages",
            "--quiet",
            *SAFE,
            *([f"--no-binary={name}" for name in map(distribution, requires)] if source else []),
            "--report",
            str(report),
            "--constraint",
            str(pins),
            *(["--no-deps", "--ignore-requires-python"] if alone else []),
            *requires,
        )
        chosen = json.loads(report.read_text())["install"]
    dropped = {canonical(name) for name in without}
    chosen = [item for item in chosen if canonical(item["metadata"]["name"]) not in dropped]
    hashes = {_key(item): item["download_info"]["archive_info"]["hashes"]["sha256"] for item in chosen}
    download(hashes, hashes if source else ())
    return {_key(item): _artifact(item, hashes[_key(item)]) for item in chosen}


def download(hashes: dict[str, str], sources: Iterable[str] = ()) -> None:
    """Download wheels (`name==version` to sha256) into the cache; pip checks each hash. Cached ones are kept.

    `sources` are the keys of those that are source distributions.
    """
    missing = {key: digest for key, digest in hashes.items() if not cache.blob(digest).exists()}
    while missing:
        # pip takes one version of a distribution at a time, and environments may differ.
        batch = {distribution(key): (key, digest) for key, digest in missing.items()}
        _download(dict(batch.values()), sources)
        missing = {key: digest for key, digest in missing.items() if key not in dict(batch.values())}


def _download(missing: dict[str, str], sources: Iterable[str]) -> None:
    folder = cache.home() / "pip-partial"
    folder.mkdir(exist_ok=True)
    listing = folder / "requirements.txt"
    listing.write_text("".join(f"{key} --hash=sha256:{digest}\n" for key, digest in missing.items()))
    _pip(
        "download",
        "--no-deps",
        "--ignore-requires-python",  # the lock decided
        "--require-hashes",
        "--quiet",
        *SAFE,
        *(f"--no-binary={distribution(key)}" for key in sources),
        "--no-build-isolation",  # pip asks a source for its metadata: with the tools that are here and hashed
        "--dest",
        str(folder),
        "--requirement",
        str(listing),
    )
    for file in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
        cache.put(file)
    lacking = [key for key, digest in missing.items() if not cache.blob(digest).exists()]
    if lacking:
        raise FetchError(
            f"pip said nothing, yet these are not in the cache: {', '.join(lacking)}; run it again"
        )


def build(project: Path, place: Path) -> Path:
    """The wheel of a project, from a copy, since a build writes into its source.

    The same source gives the same bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        shutil.copytree(project, source)
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1577836800", "PIP_NO_INDEX": "1"}
        environment["PYTHONHASHSEED"] = "0"  # the order of a set, in the metadata of some projects
        _pip(
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--quiet",
            "--wheel-dir",
            folder,
            str(source),
            environment=environment,
        )
        (wheel,) = Path(folder).glob("*.whl")
        place.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, place / wheel.name))


def build_source(artifact: Artifact, place: Path) -> Path:
    """The wheel of a source distribution that lies in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(cache.blob(artifact.sha256)) as archive:
            archive.extractall(folder, filter="data")
        (project,) = Path(folder).iterdir()
        return build(project, place)


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution(requirement: str) -> str:
    """The distribution that a requirement names, as it is written there."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    run = subprocess.run([*PIP, *arguments], capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        reasons = [line for line in run.stderr.splitlines() if not line.startswith("WARNING: Retrying")]
        raise FetchError(
            f"pip {arguments[0]} failed: {'\n'.join(reasons).strip() or run.stdout.strip()}\n"
            "Check the machine's pip settings and its way to the registry, then run it again: "
            "what was downloaded is kept."
        )


def _key(item: dict[str, Any]) -> str:
    return f"{canonical(item['metadata']['name'])}=={item['metadata']['version']}"


def _artifact(item: dict[str, Any], digest: str) -> Artifact:
    name, version = _key(item).split("==")
    return Artifact(
        file=item["download_info"]["url"].rsplit("/", 1)[-1].split("#")[0],
        version=version,
        sha256=digest,
        size=cache.blob(digest).stat().st_size,
        licence=licence(item["metadata"]),
        purl=f"pkg:pypi/{name}@{version}",
    )


def licence(metadata: dict[str, Any]) -> str:
    """The SPDX expression where the project gives one, else classifiers, else a one-line licence field."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    classifiers = [
        line.rsplit(" :: ", 1)[-1]
        for line in metadata.get("classifier", ())
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    if classifiers:
        return " AND ".join(classifiers)
    field = str(metadata.get("license") or "").strip()
    return field if field and "\n" not in field and field != "UNKNOWN" else "NOASSERTION"
