"""The text of a DOCX file: the visible text of its final form, followed by its footnotes. Pages end where Word broke them."""

import posixpath
import zipfile
from collections.abc import Iterator

from llmserve.documents.parsers.archive import main_part, opened, parse

# The transitional and the strict form (ISO/IEC 29500-1).
WORD = (
    "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
    "http://purl.oclc.org/ooxml/wordprocessingml/main",
)
# Deleted or moved text, how something was before a change, fields' code, and what stands in for a drawing that is there too.
UNREAD = {
    *("del", "moveFrom", "delText", "delInstrText", "instrText", "Fallback"),
    *("rPrChange", "pPrChange", "sectPrChange", "tblPrChange", "tblPrExChange", "tcPrChange", "trPrChange"),
}
NOTES = ("footnotes.xml", "endnotes.xml")
LEAST_SIZE = 4  # half points; smaller text is not read by people
PAGE_BREAK = "\f"


def local(name: str) -> str:
    return name.rpartition(" ")[2]


def value_of(attributes: dict[str, str], name: str = "val") -> str | None:
    """An attribute of WordprocessingML."""
    return next((attributes[key] for space in WORD if (key := f"{space} {name}") in attributes), None)


def hides(name: str, attributes: dict[str, str]) -> bool | None:
    """Whether a run's property hides it; None if the property is unrelated."""
    value = value_of(attributes)
    if name in ("vanish", "webHidden"):
        return value not in ("0", "false", "off")
    if name == "sz":
        return value is not None and value.isdecimal() and int(value) < LEAST_SIZE
    return None


def hidden_styles(archive: zipfile.ZipFile, part: str) -> set[str]:
    """Ids of the styles whose text is hidden, including styles based on them."""
    hidden: set[str] = set()
    bases: dict[str, str] = {}
    style = ""

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal style
        match local(name):
            case "style":
                style = value_of(attributes, "styleId") or ""
            case "basedOn":
                bases[style] = value_of(attributes) or ""
            case property if hides(property, attributes):
                hidden.add(style)

    if part in archive.namelist():
        parse(archive, part, start)
    hidden.discard("")
    while more := {style for style, base in bases.items() if base in hidden} - hidden:
        hidden |= more
    return hidden


class Body:
    """Collects the visible text of a part."""

    def __init__(self, hidden: set[str]) -> None:
        self.hidden_styles = hidden
        self.pieces: list[str] = []
        self.path: list[str] = []
        self.unread = 0  # depth of elements within one that is not read
        self.hidden_paragraphs: list[
            bool
        ] = []  # of the paragraphs around this place: a text box is within one
        self.hidden_runs: list[bool] = []
        self.cells = 0
        self.rendered = False  # whether Word stated where its pages end
        self.breaks: list[int] = []  # pieces that are page breaks of the author

    def start(self, name: str, attributes: dict[str, str]) -> None:
        tag = local(name)
        if self.unread or tag in UNREAD:
            self.unread += 1
            return
        self.path.append(tag)
        match tag:
            case "p":
                self.hidden_paragraphs.append(False)
            case "r":
                self.hidden_runs.append(any(self.hidden_paragraphs[-1:]))
            case "pStyle" if self.hidden_paragraphs:
                self.hidden_paragraphs[-1] = value_of(attributes) in self.hidden_styles
            case "tc":
                self.cells += 1
            case "tab" if self.path[-2:-1] == ["r"]:
                self.write("\t")
            case "br" if value_of(attributes, "type") == "page":
                self.breaks.append(len(self.pieces))
                self.pieces.append(PAGE_BREAK)
            case "br" | "cr":
                self.write("\n")
            case "noBreakHyphen":
                self.write("-")
            case "lastRenderedPageBreak":
                self.rendered = True
                self.pieces.append(PAGE_BREAK)
            case _ if self.hidden_runs and self.path[-3:-1] == ["r", "rPr"]:
                self.run_property(tag, attributes)

    def run_property(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "rStyle" and value_of(attributes) in self.hidden_styles:
            self.hidden_runs[-1] = True
        elif (hidden := hides(tag, attributes)) is not None:
            # vanish switched off shows what a style hides; a size does not.
            self.hidden_runs[-1] = hidden or (self.hidden_runs[-1] and tag == "sz")

    def end(self, name: str) -> None:
        if self.unread:
            self.unread -= 1
            return
        self.path.pop()
        match local(name):
            case "p":
                self.hidden_paragraphs.pop()
                self.pieces.append(" " if self.cells else "\n")
            case "r":
                self.hidden_runs.pop()
            case "tc":
                self.cells -= 1
                self.pieces.append("\t")
            case "tr":
                self.pieces.append("\n")

    def text(self, text: str) -> None:
        if not self.unread and self.path[-1:] == ["t"]:
            self.write(text.replace(PAGE_BREAK, " "))

    def write(self, text: str) -> None:
        if not any(self.hidden_runs):
            self.pieces.append(text)

    def content(self) -> str:
        """The text. If Word stated the ends of pages, they include the author's breaks."""
        if self.rendered:
            for place in self.breaks:
                self.pieces[place] = "\n"
        return "".join(self.pieces)


def pages(data: bytes) -> Iterator[str]:
    """The text of each page; raises Unreadable. Comments, headers, macros and properties are not read."""
    archive = opened(data)
    main = main_part(archive)
    folder = posixpath.dirname(main)
    hidden = hidden_styles(archive, posixpath.join(folder, "styles.xml"))
    texts = []
    notes = [posixpath.join(folder, name) for name in NOTES]
    for part in [main, *(note for note in notes if note in archive.namelist())]:
        body = Body(hidden)
        parse(archive, part, body.start, body.end, body.text)
        texts.append(body.content())
    yield from "\n".join(texts).split(PAGE_BREAK)
