"""The text of an HTML page as a browser without scripts shows it. Comments, scripts and attributes are not read."""

import codecs
import re
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser, LexborNode, SelectolaxError

from llmserve.documents.parsers import Reason, Unreadable

UNREAD = {
    *("script", "style", "template", "noscript", "iframe", "object", "embed", "svg", "math", "canvas"),
    *("audio", "video", "head", "datalist", "textarea", "select", "noframes"),
}
INLINE = {
    *(
        "a",
        "abbr",
        "acronym",
        "b",
        "bdi",
        "bdo",
        "big",
        "cite",
        "code",
        "data",
        "del",
        "dfn",
        "em",
        "font",
        "i",
    ),
    *(
        "ins",
        "kbd",
        "label",
        "mark",
        "q",
        "rp",
        "rt",
        "ruby",
        "s",
        "samp",
        "small",
        "span",
        "strike",
        "strong",
    ),
    *("sub", "sup", "time", "tt", "u", "var", "wbr"),
}
PREFORMATTED = {"pre", "listing", "xmp"}
TEXT = "-text"
COMMENTS = re.compile(r"/\*.*?(?:\*/|\Z)", re.DOTALL)
# A selector begins behind a brace: were it looked for everywhere, a text without braces would take quadratic time.
RULES = re.compile(r"(?<![^{}])([^{}]++)\{([^{}]*+)\}")
ZERO = r"[-+]?0*+\.?0*+(?:[a-z]++|%)?(?=;|!|\Z)"
HIDING = re.compile(
    r"(?:\A|;)(?:display:none|visibility:(?:hidden|collapse)|content-visibility:hidden|color:transparent"
    rf"|(?:opacity|font-size|max-height|max-width|height|width):{ZERO}"
    r"|(?:text-indent|left|top|right|bottom|margin-left|margin-top):-\d{3,}|clip:rect|clip-path:inset|transform:scale\(0)"
)
# Encodings that a page may name, by Python's names; loaded while files can be opened.
ENCODINGS = {
    codecs.lookup(name).name: name
    for name in (
        *("utf-8", "utf-16", "gb18030", "gbk", "gb2312", "big5", "shift_jis", "euc_jp", "euc_kr", "koi8_r"),
        *("ascii", "iso8859-1", "iso8859-2", "iso8859-15", "cp1250", "cp1251", "cp1252"),
    )
}
# A browser reads these as the larger one (WHATWG Encoding).
LARGER = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "utf-16": "utf-8"}
DECLARED = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
HEAD = 1024  # bytes, within which an encoding is declared
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
for name in (*MARKS.values(), *LARGER.values()):
    codecs.lookup(name)


def decoded(data: bytes) -> str:
    """Decode the page by its byte order mark, else by its declared encoding, else as UTF-8; raises Unreadable."""
    try:
        for mark, encoding in MARKS.items():
            if data.startswith(mark):
                return data[len(mark) :].decode(encoding)
        declared = DECLARED.search(data, 0, HEAD)
        encoding = codecs.lookup(declared[1].decode("ascii")).name if declared else "utf-8"
        if encoding not in ENCODINGS:
            raise Unreadable(Reason.ENCODING)
        return data.decode(LARGER.get(encoding, encoding))
    except (UnicodeDecodeError, LookupError):
        raise Unreadable(Reason.ENCODING) from None


def hides(style: str) -> bool:
    """Whether CSS declarations hide text, or are escaped so that this cannot be determined."""
    plain = re.sub(r"\s+", "", COMMENTS.sub("", style)).lower()
    return "\\" in plain or HIDING.search(plain) is not None


def hidden_by_sheets(tree: LexborHTMLParser) -> set[int]:
    """Ids of the elements that the page's own style sheets hide, in any medium."""
    hidden: set[int] = set()
    for sheet in tree.css("style"):
        rules = COMMENTS.sub("", sheet.text(deep=True))
        for selector, declarations in RULES.findall(rules):
            if not hides(declarations):
                continue
            try:
                hidden |= {node.mem_id for node in tree.css(selector.strip())}
            except (SelectolaxError, ValueError):
                continue  # a selector that Lexbor does not know
    return hidden


def is_hidden(node: LexborNode) -> bool:
    """Whether an element hides its content by itself."""
    if node.tag in UNREAD:
        return True
    attributes = node.attributes
    return (
        "hidden" in attributes
        or (node.tag == "dialog" and "open" not in attributes)
        or hides(attributes.get("style") or "")
    )


def block(node: LexborNode) -> LexborNode | None:
    """The nearest element around a text that begins a line."""
    parent = node.parent
    while parent is not None and parent.tag in INLINE:
        parent = parent.parent
    return parent


def pages(data: bytes) -> Iterator[str]:
    """The text, as one page; raises Unreadable."""
    tree = LexborHTMLParser(decoded(data))
    hidden = hidden_by_sheets(tree)
    pieces: list[str] = []
    last: int | None = None
    if tree.root is None:
        return
    for node in tree.root.traverse(include_text=True):
        parent = node.parent
        if parent is not None and parent.mem_id in hidden:
            hidden.add(node.mem_id)
        elif node.tag == "br":
            pieces.append("\n")
        elif node.tag == TEXT:
            around = block(node)
            if around is not None and around.mem_id != last:
                last = around.mem_id
                pieces.append("\t" if around.tag in ("td", "th") else "\n")
            text = node.text(deep=False) or ""
            preformatted = around is not None and around.tag in PREFORMATTED
            pieces.append(text if preformatted else re.sub(r"[ \t\r\n\f]+", " ", text))
        elif node.mem_id not in hidden and is_hidden(node):
            hidden.add(node.mem_id)
    yield "".join(pieces)
