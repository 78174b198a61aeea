"""Python wheels: resolve an environment of artifacts.yml, and download exactly what the lock says.

A project that publishes only source is locked as source, and its wheel is built from it. pip does both, with the
index, proxy and certificates of the machine's own pip settings. No code of a source distribution runs before its hash
is in the lock.
"""

import email.parser
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
ADVICE = (
    "Check the machine's pip settings and its connection to the registry, then run it again: finished "
    "downloads are kept."
)


class FetchError(LlmkeepError):
    """Something could not be downloaded; the message contains the client's own reason."""


def resolve(
    requires: list[str],
    constraints: list[str],
    without: Iterable[str],
    alone: bool = False,
) -> dict[str, Artifact]:
    """The wheels that pip would install for `requires` into an empty environment, minus the distributions `without`.

    `constraints` are `name==version` of the environment that this one includes. `alone`: without dependencies,
    ignoring the Python version in their metadata. Sizes come from the downloaded files, which stay in the cache.
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
    download(hashes)
    return {_key(item): _artifact(item, hashes[_key(item)]) for item in chosen}


def sources(requires: list[str], constraints: list[str]) -> dict[str, Artifact]:
    """The newest source distributions that meet `requires`, without dependencies, ignoring the Python version they require.

    None of their code is run: the version comes from the index, the licence from PKG-INFO. `constraints` as for
    `resolve`. The files stay in the cache.
    """
    pins = {canonical(distribution(pin)): pin for pin in constraints}
    chosen = {}
    for requirement in requires:
        name = canonical(distribution(requirement))
        version, file, digest = _source(requirement, pins.get(name, name))
        with tarfile.open(cache.blob(digest)) as archive:
            texts = [
                archive.extractfile(each) for each in archive if re.fullmatch(r"[^/]+/PKG-INFO", each.name)
            ]
            stated = metadata(b"".join(text.read() for text in texts if text))
        size = cache.blob(digest).stat().st_size
        purl = f"pkg:pypi/{name}@{version}"
        chosen[f"{name}=={version}"] = Artifact(file, version, digest, size, licence(stated), purl)
    return chosen


def _source(requirement: str, pin: str) -> tuple[str, str, str]:
    """Download the newest source distribution that meets both into the cache: its version, file name and sha256.

    pip's commands run a source's build backend for its metadata, before a person has reviewed the hash. Index and
    session are pip's own, with the machine's settings; they have no public interface.
    """
    from pip._internal.commands.download import DownloadCommand
    from pip._internal.exceptions import PipError
    from pip._internal.network.utils import HEADERS, raise_for_status
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.requests.exceptions import RequestException

    command, project = DownloadCommand("download", ""), Requirement(requirement)
    options, _ = command.parse_args(["--no-binary=:all:", "--no-input"])
    with command.main_context(), tempfile.TemporaryDirectory(dir=cache.home()) as folder:
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session, ignore_requires_python=True)
        both = project.specifier & Requirement(pin).specifier
        try:
            best = finder.find_best_candidate(project.name, both).best_candidate
            if best is None or not best.link.filename.endswith(".tar.gz"):
                raise FetchError(
                    f"the index has no source distribution (.tar.gz) of {project.name}{both}\n{ADVICE}"
                )
            path = Path(folder, "source")
            response = session.get(best.link.url_without_fragment, headers=HEADERS)
            raise_for_status(response)
            path.write_bytes(response.content)
            if hashes := best.link.as_hashes():
                hashes.check_against_path(str(path))
        except (PipError, RequestException) as error:
            raise FetchError(f"{project.name}{both} cannot be downloaded: {error}\n{ADVICE}") from error
        return str(best.version), best.link.filename, cache.put(path)


def download(hashes: dict[str, str], sources: Iterable[str] = ()) -> None:
    """Download wheels (`name==version` to sha256) into the cache; each hash is checked. Cached ones are kept.

    `sources` are the keys of those that are source distributions.
    """
    missing = {key: digest for key, digest in hashes.items() if not cache.blob(digest).exists()}
    for key in missing.keys() & set(sources):
        _, file, digest = _source(key, key)
        if digest != (locked := missing.pop(key)):
            raise FetchError(
                f"{file} has sha256 {digest}, the lock says {locked}: do not use it until you know why"
            )
    while missing:
        # pip takes one version of a distribution at a time, and environments may differ.
        batch = {distribution(key): (key, digest) for key, digest in missing.items()}
        _download(dict(batch.values()))
        missing = {key: digest for key, digest in missing.items() if key not in dict(batch.values())}


def _download(missing: dict[str, str]) -> None:
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
        "--dest",
        str(folder),
        "--requirement",
        str(listing),
    )
    for file in folder.glob("*.whl"):
        cache.put(file)
    lacking = [key for key, digest in missing.items() if not cache.blob(digest).exists()]
    if lacking:
        raise FetchError(
            f"pip reported no error, but these are not in the cache: {', '.join(lacking)}; run it again"
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
    """The distribution that a requirement names, as written there."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    run = subprocess.run([*PIP, *arguments], capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        reasons = [line for line in run.stderr.splitlines() if not line.startswith("WARNING: Retrying")]
        raise FetchError(
            f"pip {arguments[0]} failed: {'\n'.join(reasons).strip() or run.stdout.strip()}\n{ADVICE}"
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


def metadata(text: bytes) -> dict[str, Any]:
    """The licence fields of core metadata, by the names in pip's report."""
    headers = email.parser.BytesHeaderParser().parsebytes(text)
    return {
        "license_expression": headers["License-Expression"],
        "classifier": headers.get_all("Classifier", []),
        "license": headers["License"],
    }


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
