"""Parts of an Office Open XML file (ISO/IEC 29500), which is a ZIP archive."""

import codecs
import posixpath
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from xml.parsers import expat

from llmserve.documents.parsers import Reason, Unreadable

MOST_PARTS = 10_000
UNPACKED_BYTES = 256 << 20
CHUNK = 64 << 10
OLE = bytes.fromhex("d0cf11e0a1b11ae1")  # Office before 2007, and the envelope of encrypted files
DOCUMENT_TYPE = "/officeDocument"  # last part of the relationship's type
codecs.lookup("cp437")  # of names in archives; loaded while files can be opened

Start = Callable[[str, dict[str, str]], None]


def opened(data: bytes) -> zipfile.ZipFile:
    """Open the archive; raises Unreadable if it is not an archive, is encrypted, or exceeds the size limit when unpacked."""
    if data.startswith(OLE):
        raise Unreadable(Reason.ENCRYPTED)
    try:
        archive = zipfile.ZipFile(BytesIO(data))
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise Unreadable(Reason.BROKEN) from None
    parts = archive.infolist()
    if any(part.flag_bits & 1 for part in parts):
        raise Unreadable(Reason.ENCRYPTED)
    # zipfile unpacks no more of a part than the size that its entry has.
    if len(parts) > MOST_PARTS or sum(part.file_size for part in parts) > UNPACKED_BYTES:
        raise Unreadable(Reason.LARGE)
    return archive


def parse(
    archive: zipfile.ZipFile,
    part: str,
    start: Start,
    end: Callable[[str], None] | None = None,
    text: Callable[[str], None] | None = None,
) -> None:
    """Parse a part and call back for its elements and text; names are `NAMESPACE NAME`. Raises Unreadable, also for a document
    type declaration: it can declare entities, and Office writes none.
    """

    def refuse(*_: object) -> None:
        raise Unreadable(Reason.BROKEN)

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    try:
        with archive.open(part) as content:
            while chunk := content.read(CHUNK):
                parser.Parse(chunk)
        parser.Parse(b"", True)
    except (KeyError, expat.ExpatError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        raise Unreadable(Reason.BROKEN) from None


def main_part(archive: zipfile.ZipFile) -> str:
    """The name of the part with the document; raises Unreadable."""
    targets: list[str] = []

    def start(_: str, attributes: dict[str, str]) -> None:
        if attributes.get("Type", "").endswith(DOCUMENT_TYPE):
            targets.append(posixpath.normpath(attributes.get("Target", "").lstrip("/")))

    parse(archive, "_rels/.rels", start)
    if len(targets) != 1:
        raise Unreadable(Reason.BROKEN)
    return targets[0]
