"""A signed archive for auditors, such as a report of the control node.

It is a reproducible tar archive: its files, then `files` with a line `SHA256  NAME` for each, then
`signature`: a signed head (heads.py) over the lines of `files`, by the key of the control node's record under another name.

"""

import hashlib
import io
import tarfile
from datetime import datetime

from llmproof.heads import Head, HeadError, Signer, Tree, Verifier

FILES, SIGNATURE = "files", "signature"
LIMIT = 256 * 1024 * 1024  # bytes of an archive


class ArchiveRefused(Exception):
    """The archive differs from what was signed, or contradicts itself. The message names the place."""


def packed(files: dict[str, bytes], signer: Signer, time: datetime) -> bytes:
    """The archive of FILES, in their order, signed at TIME (UTC)."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}".encode() for name, content in files.items()]
    head = Head(len(lines), _root(lines), time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    return _tar({**files, FILES: b"".join(line + b"\n" for line in lines), SIGNATURE: signer.sign(head)})


def opened(archive: bytes, verifier: Verifier) -> tuple[dict[str, bytes], Head]:
    """The files of ARCHIVE and the head over them; ArchiveRefused unless each byte is as the owner of VERIFIER signed it.

    VERIFIER: the key of the record, scoped to the kind of archive.
    """
    files = _unpacked(archive)
    names = list(files)
    if names[-2:] != [FILES, SIGNATURE]:
        raise ArchiveRefused(f"it does not end with {FILES} and {SIGNATURE}, so nothing in it is signed")
    try:
        head = verifier.open(files[SIGNATURE])
    except HeadError as error:
        raise ArchiveRefused(f"{SIGNATURE}: {error}") from error
    lines = files[FILES].removesuffix(b"\n").split(b"\n")
    if (head.size, head.root) != (len(lines), _root(lines)):
        raise ArchiveRefused(
            f"{FILES} differs from what was signed, or the signature belongs to another archive"
        )
    parts = [line.decode(errors="replace").partition("  ") for line in lines]
    signed = {name: digest for digest, _, name in parts}
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in names[:-2]}
    for name, digest in signed.items():
        if name not in digests:
            raise ArchiveRefused(f"{name} is missing: it was signed, and then removed")
        if digests[name] != digest:
            raise ArchiveRefused(f"{name} has SHA-256 {digests[name]}, but {digest} was signed")
    if more := sorted(digests.keys() - signed.keys()):
        raise ArchiveRefused(f"{more[0]} was not signed: it was added later")
    if names[:-2] != list(signed):
        raise ArchiveRefused(f"its files are in another order than signed: {', '.join(names[:-2])}")
    if _tar(files) != archive:
        raise ArchiveRefused("its files are as signed, but the bytes around them are not those of an archive")
    return {name: files[name] for name in signed}, head


def _root(lines: list[bytes]) -> bytes:
    tree = Tree()
    for line in lines:
        tree.add(line)
    return tree.root()


def _tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _unpacked(archive: bytes) -> dict[str, bytes]:
    """Files by name in their order, unverified."""
    if len(archive) > LIMIT:
        raise ArchiveRefused(f"it has {len(archive)} bytes; no archive has more than {LIMIT}")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                # A sparse file is read with all its holes, however large.
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or member.name in files:
                    raise ArchiveRefused(f"{member.name[:200]!r} is a duplicate, or is not a plain file")
                files[member.name] = content.read()
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise ArchiveRefused(f"it is not an archive, or is truncated ({error})") from error
    return files
