"""Download files that the signed manifest names from the estate's mirror, by TLS 1.3, verified by hash."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import ssl
import subprocess
import tempfile
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.bundle.progress import Progress
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic

SECONDS = 60  # of silence, before a connection counts as dead
BLOCK = 1 << 20
TRIES = 5  # for one file in one run
BUSY_SECONDS = 15  # until a mirror that does not say when is asked again
MOST_BUSY_SECONDS = 300  # that a mirror may ask for
PATIENCE = 24 * 3600  # seconds in which a busy mirror gets to a file; 472 GB take an hour at 1 Gbit/s
MANIFEST = "MANIFEST.json"
MANIFEST_BYTES = 16 << 20  # 600 files take 0.4 MB
SIGNATURE_BYTES = 64 << 10


class MirrorError(Exception):
    """The mirror does not give what its manifest promises; the message says what, and what to do."""


class BusyError(MirrorError):
    """The mirror serves as many downloads as it may; ask again after `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Entry:
    """A file of the bundle: its path there, size in bytes, and hexadecimal SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Statement:
    """A document whose signature was verified, and both as they were signed."""

    document: dict[str, Any]
    content: bytes
    signature: bytes


class Mirror:
    """One connection to the mirror, kept for all files. Trusts the estate's root alone."""

    def __init__(self, url: str, ca: Path, keyring: Path, certificate: Path | None = None) -> None:
        """Does not connect yet. The certificate, whose key lies beside it as .key, is shown to the mirror."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise MirrorError(f"{url!r} is not the address of a mirror; write it as https://NAME:PORT")
        self.url, self.keyring = url, keyring
        self.folder = parts.path.rstrip("/")
        try:
            context = ssl.create_default_context(cafile=str(ca))
        except OSError as problem:
            raise MirrorError(f"{ca}: {problem.strerror}; playbooks/hosts.yml places it") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if certificate is not None:
            try:
                context.load_cert_chain(certificate, certificate.with_suffix(".key"))
            except OSError as problem:
                raise MirrorError(
                    f"{certificate} and its .key: {problem.strerror}; the role pki places them"
                ) from None
        self.connection = http.client.HTTPSConnection(
            parts.hostname, parts.port or 443, timeout=SECONDS, context=context
        )

    def get(self, path: str, begin: int = 0) -> http.client.HTTPResponse:
        """Request a file of the bundle from byte `begin` on."""
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        try:
            self.connection.request("GET", f"{self.folder}/{urllib.parse.quote(path)}", headers=headers)
            response = self.connection.getresponse()
        except (OSError, http.client.HTTPException) as problem:
            self.connection.close()
            raise MirrorError(
                f"{self.url}/{path}: {problem}; is the mirror up, its certificate valid?"
            ) from problem
        if response.status not in (200, 206):
            self.connection.close()
            way = "run the role mirror"
            if response.status == 503:
                after = response.getheader("Retry-After", "")
                seconds = min(int(after), MOST_BUSY_SECONDS) if after.isdecimal() else BUSY_SECONDS
                raise BusyError(f"{self.url}/{path}: the mirror serves as many downloads as it may", seconds)
            if response.status == 403:
                way = "the mirror knows hosts by certificate and inventory: run the roles pki here, and mirror there"
            elif "/releases/" in self.folder:
                way = "add it there with `llmkeep release add`"
            raise MirrorError(f"{self.url}/{path} answered {response.status} {response.reason}; {way}")
        return response

    def small(self, name: str, most: int) -> bytes:
        """A file whose size nothing signed states: MirrorError above so many bytes."""
        try:
            content = self.get(name).read(most + 1)
        except (OSError, http.client.HTTPException) as problem:
            self.connection.close()
            raise MirrorError(f"{self.url}/{name} broke off: {problem}; run again") from problem
        if len(content) > most:
            self.connection.close()
            raise MirrorError(
                f"{self.url}/{name} is longer than {most} bytes; do not use this mirror, find out who changed it"
            )
        return content

    def manifest(self, kind: str) -> dict[str, Any]:
        """The manifest, which a key in the keyring must have signed (OpenPGP) as KIND, `bundle` or `release`."""
        return self.statement(MANIFEST, kind).document

    def statement(self, name: str, kind: str) -> Statement:
        """The document NAME, which a key in the keyring must have signed (OpenPGP) as KIND."""
        with tempfile.TemporaryDirectory(prefix="llmkeep-manifest-") as folder:
            signed, signature = Path(folder, "signed"), Path(folder, "signature")
            signed.write_bytes(self.small(name, MANIFEST_BYTES))
            signature.write_bytes(self.small(f"{name}.sig", SIGNATURE_BYTES))
            argv = ["sqv", "--keyring", str(self.keyring), "--signature-file", str(signature), str(signed)]
            try:
                done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
            except FileNotFoundError:
                raise MirrorError("sqv is not on this host; Debian 13's apt depends on it") from None
            if done.returncode != 0:
                raise MirrorError(
                    f"{name} of {self.url} has no valid signature by a key in {self.keyring}"
                    f" ({done.stderr.strip()[-300:]}); do not use this mirror, find out who changed it"
                )
            document: dict[str, Any] = json.loads(signed.read_bytes())
            if (stated := document.get("type")) != kind:
                raise MirrorError(
                    f"{name} of {self.url} is signed as {stated!r}, and {kind!r} is needed; build or sign it again, and "
                    "find out who changed the mirror"
                )
            return Statement(document, signed.read_bytes(), signature.read_bytes())

    def fetch(self, entry: Entry, path: Path, progress: Progress | None = None) -> None:
        """Download the entry's file to path, resuming where it stopped; MirrorError if the hash differs.

        A mirror that is busy is asked again, for PATIENCE.
        """
        if path.is_file() and path.stat().st_size == entry.size and atomic.sha256_of(path) == entry.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        if partial.exists() and partial.stat().st_size > entry.size:
            partial.unlink()
        tries, waited = 0, 0.0
        while tries < TRIES:
            try:
                self._append(entry, partial, progress)
            except BusyError as busy:
                waited += self._wait(busy, waited, progress)
                continue
            tries += 1
            if partial.stat().st_size < entry.size:
                continue
            actual = atomic.sha256_of(partial)
            if actual == entry.sha256:
                partial.replace(path)
                return
            partial.unlink()
            raise MirrorError(
                f"{self.url}/{entry.path} has sha256 {actual}, but the signed manifest says {entry.sha256};"
                " run `llmkeep bundle verify` on the mirror"
            )
        raise MirrorError(
            f"{self.url}/{entry.path} broke off {TRIES} times at {partial.stat().st_size} of {entry.size} B;"
            " look at the network, and run again: it goes on from there"
        )

    def _wait(self, busy: BusyError, waited: float, progress: Progress | None) -> float:
        """Wait as the mirror asks; returns the seconds, which differ so that hosts do not come back all at once."""
        if waited >= PATIENCE:
            raise MirrorError(
                f"{busy}, for {waited / 60:.0f} minutes; look at which hosts fetch (`journalctl -t llmkeep-fetch` on them),"
                " raise mirror_downloads, and run again: it goes on where it is"
            ) from busy
        seconds = busy.seconds * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        if progress:
            progress.wait(seconds)
        time.sleep(seconds)
        return seconds

    def _append(self, entry: Entry, partial: Path, progress: Progress | None) -> None:
        """Append to the partial file what arrives until the connection ends or fails, and no more than the entry's size."""
        begin = partial.stat().st_size if partial.exists() else 0
        if begin == entry.size:
            partial.touch()
            return
        response = self.get(entry.path, begin)
        left = entry.size - begin if response.status == 206 else entry.size
        if progress and response.status == 200:
            progress.add(-begin)
        with partial.open("ab" if response.status == 206 else "wb") as stream:
            try:
                # One byte more than is left tells an end from an answer that goes on.
                while block := response.read1(min(BLOCK, left + 1)):
                    if len(block) > left:
                        self.connection.close()
                        raise MirrorError(
                            f"{self.url}/{entry.path} is longer than the {entry.size} bytes in the signed manifest;"
                            " run `llmkeep bundle verify` on the mirror"
                        )
                    stream.write(block)
                    left -= len(block)
                    if progress:
                        progress.add(len(block))
            except (OSError, http.client.HTTPException):
                pass  # what came is kept; fetch asks for the rest
            stream.flush()
            os.fsync(stream.fileno())
        if partial.stat().st_size < entry.size:
            self.connection.close()


def partial_of(path: Path) -> Path:
    """Where a download of this file is written until it is whole."""
    return path.parent / f"{path.name}.partial"


def progress_of(name: str, folder: Path, files: list[tuple[Entry, Path]]) -> Progress:
    """The progress of a download into FOLDER, after what earlier runs left; MirrorError where the rest has no room there."""
    here = sum(
        min(entry.size, place.stat().st_size)
        for entry, path in files
        for place in (path, partial_of(path))
        if place.is_file()
    )
    total = sum(entry.size for entry, _ in files)
    if (free := shutil.disk_usage(folder).free) < total - here:
        raise MirrorError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and {(total - here) / 1e9:.1f} GB are to be copied: make room"
        )
    return Progress(name, total, here)


def not_trusted_yet(module: Any, *files: Any) -> bool:
    """Whether a check-mode run cannot ask the mirror, because earlier tasks would place what this host verifies it by. Warns."""
    lacking = [str(path) for path in files if path and not Path(path).exists()]
    if not module.check_mode or not lacking:
        return False
    module.warn(
        f"the mirror was not asked, since {', '.join(lacking)} would be placed first: its content is unknown"
    )
    return True


def entries(manifest: dict[str, Any], folder: str = "") -> list[Entry]:
    """The files of the bundle, or of one folder of it, by their paths in the bundle."""
    files = []
    for item in manifest["files"]:
        path = str(item["path"])
        if not folder or path.startswith(f"{folder}/"):
            if (
                path.startswith("/")
                or ".." in Path(path).parts
                or not re.fullmatch(r"[0-9a-f]{64}", item["sha256"])
            ):
                raise MirrorError(
                    f"the manifest has the entry {path!r}, which is unsafe; build the bundle again"
                )
            files.append(Entry(path, int(item["size"]), item["sha256"]))
    if not files:
        raise MirrorError(
            f"bundle {manifest.get('serial')} has nothing under {folder}/; name a folder that it has, or use another bundle"
        )
    return sorted(files, key=lambda entry: entry.path)
