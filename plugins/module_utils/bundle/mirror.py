"""Download files that the signed manifest names from the estate's mirror, by TLS 1.3, verified by hash."""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import subprocess
import tempfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic

SECONDS = 60  # of silence, before a connection counts as dead
BLOCK = 1 << 20
TRIES = 5  # for one file in one run
MANIFEST = "MANIFEST.json"
MANIFEST_BYTES = 16 << 20  # 600 files take 0.4 MB
SIGNATURE_BYTES = 64 << 10


class MirrorError(Exception):
    """The mirror does not give what its manifest promises; the message says what, and what to do."""


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
            raise MirrorError(f"{url!r} is no address of a mirror; write it as https://NAME:PORT")
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
                f"{self.url}/{name} is longer than {most} bytes; do not use this mirror, look at who changed it"
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
                    f" ({done.stderr.strip()[-300:]}); do not use this mirror, look at who changed it"
                )
            document: dict[str, Any] = json.loads(signed.read_bytes())
            if (stated := document.get("type")) != kind:
                raise MirrorError(
                    f"{name} of {self.url} is signed as {stated!r}, and {kind!r} is needed; build or sign it again,"
                    " and look at who changed the mirror"
                )
            return Statement(document, signed.read_bytes(), signature.read_bytes())

    def fetch(self, entry: Entry, path: Path) -> None:
        """Download the entry's file to path, resuming where it stopped; MirrorError if the hash differs."""
        if path.is_file() and path.stat().st_size == entry.size and atomic.sha256_of(path) == entry.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f"{path.name}.partial"
        if partial.exists() and partial.stat().st_size > entry.size:
            partial.unlink()
        for _ in range(TRIES):
            self._append(entry, partial)
            if partial.stat().st_size < entry.size:
                continue
            seen = atomic.sha256_of(partial)
            if seen == entry.sha256:
                partial.replace(path)
                return
            partial.unlink()
            raise MirrorError(
                f"{self.url}/{entry.path} has sha256 {seen}, the signed manifest says {entry.sha256};"
                " run `llmkeep bundle verify` on the mirror"
            )
        raise MirrorError(
            f"{self.url}/{entry.path} broke off {TRIES} times at {partial.stat().st_size} of {entry.size} B;"
            " look at the network, and run again: it goes on from there"
        )

    def _append(self, entry: Entry, partial: Path) -> None:
        """Append to the partial file what arrives until the connection ends or fails, and no more than the entry's size."""
        begin = partial.stat().st_size if partial.exists() else 0
        if begin == entry.size:
            partial.touch()
            return
        response = self.get(entry.path, begin)
        left = entry.size - begin if response.status == 206 else entry.size
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
            except (OSError, http.client.HTTPException):
                pass  # what came is kept; fetch asks for the rest
            stream.flush()
            os.fsync(stream.fileno())
        if partial.stat().st_size < entry.size:
            self.connection.close()


def not_trusted_yet(module: Any, *files: Any) -> bool:
    """Whether a check-mode run cannot ask the mirror, because earlier tasks would place what this host verifies it by. Warns."""
    lacking = [str(path) for path in files if path and not Path(path).exists()]
    if not module.check_mode or not lacking:
        return False
    module.warn(
        f"the mirror was not asked, since {', '.join(lacking)} would be placed before: what it has is not shown"
    )
    return True


def entries(manifest: dict[str, Any], folder: str = "") -> list[Entry]:
    """The files of the bundle, or of one folder of it, by their paths in the bundle."""
    found = []
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
            found.append(Entry(path, int(item["size"]), item["sha256"]))
    if not found:
        raise MirrorError(
            f"bundle {manifest.get('serial')} has nothing under {folder}/; name what it has, or carry another"
        )
    return sorted(found, key=lambda entry: entry.path)
