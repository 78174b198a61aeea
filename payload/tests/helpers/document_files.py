"""Documents as bytes, written by hand: no library that reads them has a part in them."""

import io
import zipfile
from collections.abc import Mapping

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
S = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
R = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
RESOURCES = "/Resources << /Font << /F1 3 0 R >> /ExtGState << /Clear << /ca 0 >> >> >>"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"


def archive(parts: Mapping[str, str | bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, part in parts.items():
            file.writestr(name, part)
    return content.getvalue()


def with_part(content: bytes, name: str, part: str) -> bytes:
    """An archive with one more part."""
    copy = io.BytesIO(content)
    with zipfile.ZipFile(copy, "a") as file:
        file.writestr(name, part)
    return copy.getvalue()


def relationships(*targets: tuple[str, str, str]) -> str:
    """Of (id, last part of the type, target)."""
    rows = "".join(
        f'<Relationship Id="{name}" Type="{R}/{kind}" Target="{target}"/>' for name, kind, target in targets
    )
    return f'<Relationships xmlns="{PACKAGE}/relationships">{rows}</Relationships>'


def docx(body: str, prologue: str = "", **parts: str | bytes) -> bytes:
    """A DOCX with this body; `parts` by their name in the folder word, `_` for a dot."""
    main = f'{prologue}<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>'
    more = {f"word/{name.replace('_', '.')}": part for name, part in parts.items()}
    root = relationships(("rId1", "officeDocument", "word/document.xml"))
    return archive({"_rels/.rels": root, "word/document.xml": main} | more)


def styles(*rows: str) -> str:
    return f'<w:styles xmlns:w="{W}">{"".join(rows)}</w:styles>'


def paragraph(text: str, run: str = "", properties: str = "") -> str:
    """A paragraph of one run, with properties of either."""
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:rPr>{run}</w:rPr><w:t>{text}</w:t></w:r></w:p>"


def xlsx(sheets: Mapping[str, str], states: Mapping[str, str] | None = None, prologue: str = "") -> bytes:
    """An XLSX with these sheets' content by their names; style 1 is a date."""
    names = {name: f"sheet{number}" for number, name in enumerate(sheets, 1)}
    kinds = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    overrides = "".join(
        f'<Override PartName="/xl/worksheets/{part}.xml" ContentType="{kinds}.worksheet+xml"/>'
        for part in names.values()
    )
    rows = "".join(
        f'<sheet name="{name}" sheetId="{part[5:]}" state="{(states or {}).get(name, "visible")}" r:id="{part}"/>'
        for name, part in names.items()
    )
    looks = (
        "<fonts><font/></fonts><fills><fill><patternFill/></fill></fills><borders><border/></borders>"
        '<cellStyleXfs><xf/></cellStyleXfs><cellXfs><xf numFmtId="0"/><xf numFmtId="14"/></cellXfs>'
    )
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
        f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{kinds}.sheet.main+xml"/><Override PartName="/xl/styles.xml" ContentType="{kinds}.styles+xml"/>'
        f"{overrides}</Types>",
        "_rels/.rels": relationships(("rId1", "officeDocument", "xl/workbook.xml")),
        "xl/workbook.xml": f'<workbook xmlns="{S}" xmlns:r="{R}"><sheets>{rows}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": relationships(
            ("styles", "styles", "styles.xml"),
            *((part, "worksheet", f"worksheets/{part}.xml") for part in names.values()),
        ),
        "xl/styles.xml": f'<styleSheet xmlns="{S}">{looks}</styleSheet>',
    }
    for name, part in names.items():
        parts[f"xl/worksheets/{part}.xml"] = f'{prologue}<worksheet xmlns="{S}">{sheets[name]}</worksheet>'
    return archive(parts)


def cell(place: str, text: str) -> str:
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


def pdf(*pages: str, trailer: str = "", page: str = "") -> bytes:
    """A PDF whose pages have these content streams, a font F1, and the entries of `page`."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, content in enumerate(pages):
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {5 + 2 * number} 0 R {RESOURCES} {page} >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    file = "%PDF-1.7\n"
    places = []
    for number, each in enumerate(objects, 1):
        places.append(len(file))
        file += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    return (
        f"{file}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
        f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(file)}\n%%EOF\n"
    ).encode("latin-1")


def drawn(text: str, x: int = 50, y: int = 700, size: float = 12, before: str = "") -> str:
    """The content stream of a text at a place, with operators before it."""
    return f"q BT {before} /F1 {size} Tf {x} {y} Td ({text}) Tj ET Q\n"
