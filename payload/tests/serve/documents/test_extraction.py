"""Files become the text that a person sees in them, or are refused by name; nothing of a file runs or reaches out."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from document_files import W, archive, cell, docx, drawn, paragraph, pdf, styles, xlsx

from llmserve.documents.extraction import UnreadableFile, pages_of, text_of
from llmserve.documents.parsers import MOST_PAGES

ENTITY = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
LOCK = (
    "/Encrypt << /Filter /Standard /V 2 /R 3 /Length 128 /P -44 /O ({0}) /U ({0}) >> /ID [<00> <00>]".format(
        "x" * 32
    )
)


def read(folder: Path, name: str, content: bytes | str) -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return text_of(file)


def refusal(folder: Path, name: str, content: bytes | str) -> str:
    with pytest.raises(UnreadableFile, match=name) as refused:
        read(folder, name, content)
    return str(refused.value)


# PDF
def test_the_pages_of_a_pdf_are_apart(tmp_path: Path) -> None:
    assert read(tmp_path, "rules.pdf", pdf(drawn("Page one"), drawn("Page two"))) == "Page one\fPage two"


@pytest.mark.parametrize(
    "hidden",
    [
        drawn("unseen", before="3 Tr"),
        drawn("unseen", before="7 Tr"),
        drawn("unseen", size=0.5),
        drawn("unseen", x=900),
        drawn("unseen", before="/Clear gs"),
    ],
    ids=["invisible", "clipping", "tiny", "beside the page", "transparent"],
)
def test_hidden_text_of_a_pdf_is_dropped(tmp_path: Path, hidden: str) -> None:
    assert read(tmp_path, "rules.pdf", pdf(drawn("Shown") + hidden)).split() == ["Shown"]


def test_an_encrypted_pdf_is_named_so(tmp_path: Path) -> None:
    assert "is encrypted" in refusal(tmp_path, "locked.pdf", pdf(drawn("Secret"), trailer=LOCK))


@pytest.mark.parametrize("content", [b"", b"%PDF-1.7\n", b"MZ" * 500, pdf(drawn("x"))[:200]])
def test_a_broken_pdf_is_named_so(tmp_path: Path, content: bytes) -> None:
    assert "is broken" in refusal(tmp_path, "broken.pdf", content)


def test_a_pdf_of_too_many_pages_is_named_so(tmp_path: Path) -> None:
    assert f"more than {MOST_PAGES} pages" in refusal(tmp_path, "long.pdf", pdf(*["n"] * (MOST_PAGES + 1)))


# DOCX
def test_a_docx_gives_its_final_text_and_its_notes_page_by_page(tmp_path: Path) -> None:
    body = (
        paragraph("First ")
        + '<w:p><w:r><w:br w:type="page"/></w:r></w:p>'
        + "<w:p><w:ins><w:r><w:t>Inserted</w:t></w:r></w:ins><w:r><w:t>, kept.</w:t></w:r></w:p>"
        + f"<w:tbl><w:tr><w:tc>{paragraph('a')}</w:tc><w:tc>{paragraph('b')}</w:tc></w:tr></w:tbl>"
    )
    note = f'<w:footnotes xmlns:w="{W}"><w:footnote>{paragraph("A note.")}</w:footnote></w:footnotes>'
    first, second = read(tmp_path, "rules.docx", docx(body, footnotes_xml=note)).split("\f")
    assert first.split() == ["First"]
    assert second.split() == ["Inserted,", "kept.", "a", "b", "A", "note."]


@pytest.mark.parametrize(
    "hidden",
    [
        paragraph("unseen", "<w:vanish/>"),
        paragraph("unseen", '<w:sz w:val="1"/>'),
        paragraph("unseen", '<w:rStyle w:val="Ghost"/>'),
        paragraph("unseen", properties='<w:pStyle w:val="Child"/>'),
        "<w:p><w:del><w:r><w:delText>unseen</w:delText></w:r></w:del></w:p>",
        "<w:p><w:moveFrom><w:r><w:t>unseen</w:t></w:r></w:moveFrom></w:p>",
        "<w:p><w:r><w:instrText>unseen</w:instrText></w:r></w:p>",
        "<w:p><!-- unseen --></w:p>",
    ],
    ids=["vanish", "size", "style", "based on a style", "deleted", "moved", "field", "comment"],
)
def test_hidden_text_of_a_docx_is_dropped(tmp_path: Path, hidden: str) -> None:
    ghost = styles(
        '<w:style w:styleId="Ghost"><w:rPr><w:vanish/></w:rPr></w:style>',
        '<w:style w:styleId="Child"><w:basedOn w:val="Ghost"/></w:style>',
    )
    content = docx(paragraph("Shown") + hidden + paragraph("too"), styles_xml=ghost)
    assert read(tmp_path, "rules.docx", content).split() == ["Shown", "too"]


def test_text_that_was_hidden_before_a_tracked_change_is_read(tmp_path: Path) -> None:
    run = "<w:rPrChange><w:rPr><w:vanish/></w:rPr></w:rPrChange>"
    assert read(tmp_path, "rules.docx", docx(paragraph("Shown", run))).strip() == "Shown"


def test_comments_macros_and_properties_are_not_read(tmp_path: Path) -> None:
    parts: dict[str, str | bytes] = {
        "comments_xml": f'<w:comments xmlns:w="{W}">{paragraph("unseen")}</w:comments>',
        "vbaProject_bin": b"Sub unseen()",
        "header1_xml": "unseen",
    }
    assert read(tmp_path, "macro.docx", docx(paragraph("Shown"), "", **parts)).strip() == "Shown"
    assert "has the unsupported format '.docm'" in refusal(tmp_path, "macro.docm", docx(paragraph("Shown")))


def test_an_encrypted_or_old_office_file_is_named_so(tmp_path: Path) -> None:
    assert "is encrypted" in refusal(tmp_path, "old.docx", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(2000))


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = archive({"word/document.xml": bytes(257 << 20)})
    assert len(bomb) < 2 << 20
    assert "exceeds the size limit when unpacked" in refusal(tmp_path, "bomb.docx", bomb)


def test_a_part_that_is_larger_than_it_says_is_broken(tmp_path: Path) -> None:
    content = archive({"_rels/.rels": bytes(60_000)}).replace(
        struct.pack("<I", 60_000), struct.pack("<I", 60)
    )
    assert "is broken" in refusal(tmp_path, "lie.docx", content)


@pytest.mark.parametrize("prologue", [ENTITY, LAUGHS])
def test_entities_are_not_read(tmp_path: Path, prologue: str) -> None:
    body = paragraph("&e;" if prologue is ENTITY else "&b;")
    assert "is broken" in refusal(tmp_path, "entity.docx", docx(body, prologue))
    sheet = f"<sheetData><row r='1'>{cell('A1', '&e;')}</row></sheetData>"
    assert "is broken" in refusal(tmp_path, "entity.xlsx", xlsx({"One": sheet}, prologue=ENTITY))


@pytest.mark.parametrize(
    "content", [b"PK", archive({}), archive({"_rels/.rels": "<x/>"}), docx("<w:p>"), docx("x")[:-50]]
)
def test_a_broken_docx_is_named_so(tmp_path: Path, content: bytes) -> None:
    assert "is broken" in refusal(tmp_path, "broken.docx", content)


# XLSX
def test_a_sheet_is_a_page_with_values_and_without_what_is_hidden(tmp_path: Path) -> None:
    shown = (
        '<cols><col min="3" max="4" hidden="1"/></cols><sheetData>'
        f'<row r="1">{cell("A1", "Travel")}<c r="B1"><f>A9*2</f><v>42</v></c>{cell("C1", "unseen")}</row>'
        f'<row r="2" hidden="1">{cell("A2", "unseen")}</row>'
        '<row r="3"><c r="A3" s="1"><v>46024</v></c><c r="E3"><v>2.5</v></c></row></sheetData>'
    )
    secret = f'<sheetData><row r="1">{cell("A1", "unseen")}</row></sheetData>'
    content = xlsx({"Costs": shown, "Secret": secret, "End": "<sheetData/>"}, {"Secret": "veryHidden"})
    assert read(tmp_path, "costs.xlsx", content) == "Costs\nTravel\t42\n2026-01-02\t\t2.5\fEnd"


# HTML
def test_a_page_of_html_gives_its_text_in_lines(tmp_path: Path) -> None:
    page = "<title>T</title><h1>Rules</h1><p>Tra<b>vel</b> is\nbooked<p>early<table><tr><td>a<td>b</table>end"
    assert read(tmp_path, "rules.html", page).split("\n") == [
        "",
        "Rules",
        "Travel is booked",
        "early\ta\tb",
        "end",
    ]


@pytest.mark.parametrize(
    "hidden",
    [
        "<!-- unseen -->",
        "<p hidden>unseen",
        '<p style="color: red; DISPLAY : /* x */ none">unseen',
        '<div style="visibility:hidden"><p>unseen</p></div>',
        '<p style="font-size:0px">unseen',
        '<p style="opacity:.0">unseen',
        '<p style="position:absolute;left:-9999px">unseen',
        '<p style="disp\\6cay:none">unseen',
        "<p class=ghost><b>unseen</b>",
        "<script>unseen()</script><style>unseen</style><template>unseen</template><noscript>unseen</noscript>",
        '<img alt="unseen" title="unseen">',
    ],
)  # fmt: skip
def test_hidden_text_of_html_is_dropped(tmp_path: Path, hidden: str) -> None:
    sheet = "<style>@media print { p.ghost { display: none } }</style>"
    page = f"{sheet}<p style='font-size:0.9em;width:0.5px'>Shown</p>{hidden}</p><p>too"
    assert read(tmp_path, "rules.html", page).split() == ["Shown", "too"]


def test_html_is_read_by_the_encoding_that_it_declares(tmp_path: Path) -> None:
    assert read(tmp_path, "a.html", "<meta charset=gb2312><p>出差".encode("gbk")).strip() == "出差"
    assert read(tmp_path, "b.html", "<p>出差".encode("utf-16")).strip() == "出差"
    assert read(tmp_path, "c.htm", "<p>出差").strip() == "出差"


@pytest.mark.parametrize(
    "content",
    [b"<p>\xff\xfe?", b"<meta charset=utf-8>\xe9", b"<meta charset=zip>x", b"<meta charset=gbk>\xff"],
)
def test_html_in_another_encoding_than_it_says_is_named_so(tmp_path: Path, content: bytes) -> None:
    assert "encoding" in refusal(tmp_path, "wrong.html", content)


# Paths that are not files
def test_a_pipe_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.pdf").mkdir()
    with pytest.raises(IsADirectoryError):
        text_of(tmp_path / "folder.pdf")
    os.mkfifo(tmp_path / "pipe.pdf")
    with pytest.raises(UnreadableFile, match="is not a file"):
        text_of(tmp_path / "pipe.pdf")


# Parsers that a document has taken over, or that find no end
def outcome(folder: Path, code: str, seconds: float = 30) -> str:
    """The refusal of a file whose parser runs this code."""
    file = folder / "rules.pdf"
    file.write_bytes(b"%PDF")
    with file.open("rb") as content, pytest.raises(UnreadableFile) as refused:
        pages_of(file, content.fileno(), [sys.executable, "-c", code], seconds)
    return str(refused.value)


CONFINED = """
import errno, os, resource, socket, sys
from llmserve.documents.parsers import confinement
{before}
confinement.confine()
{after}
"""


def test_a_parser_that_does_not_end_is_ended(tmp_path: Path) -> None:
    assert "took more than 1 s" in outcome(tmp_path, "import time; time.sleep(60)", seconds=1)


def test_a_parser_that_computes_without_end_is_ended(tmp_path: Path) -> None:
    limit = "confinement.LIMITS[resource.RLIMIT_CPU] = 1"
    code = CONFINED.format(before=limit, after="while True: pass")
    assert f"ended its parser ({-signal.SIGKILL})" in outcome(tmp_path, code)


def test_a_parser_that_takes_more_memory_is_ended(tmp_path: Path) -> None:
    assert "ended its parser (1)" in outcome(tmp_path, CONFINED.format(before="", after="bytearray(2 << 30)"))


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("'x' * (65 << 20)", "ended its parser"),
        ("'{}]'", "invalid output"),
        ("'{\"pages\": [1]}'", "invalid output"),
        ("'[' * 100000", "invalid output"),
        ('\'{"pages": [], "more": 1}\'', "invalid output"),
        ('\'{"reason": "\\\\u001b[2J"}\'', "is broken"),
        ("'{\"pages\": [\"' + 'x' * (9 << 20) + '\"]}'", "more than 8 Mi letters"),
    ],
)
def test_a_parser_that_writes_something_else_is_not_believed(
    tmp_path: Path, written: str, reason: str
) -> None:
    message = outcome(tmp_path, f"print({written}, flush=True)")
    assert reason in message
    assert "\x1b" not in message


def test_a_parser_has_no_files_network_programs_or_root(tmp_path: Path) -> None:
    after = """
tried = {
    "read": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "write": lambda: os.open("/tmp/x", os.O_WRONLY | os.O_CREAT),
    "connect": lambda: socket.socket(socket.AF_INET),
    "local": lambda: socket.socket(socket.AF_UNIX),
    "fork": os.fork,
    "program": lambda: os.execv("/bin/true", ["true"]),
    "signal": lambda: os.kill(1, 0),
    "root": lambda: os.setuid(0),
    "limits": lambda: resource.prlimit(0, resource.RLIMIT_CPU, (-1, -1)),
    "duplicate": lambda: os.dup(0),
}
pages = []
for name, attempt in tried.items():
    try:
        pages.append(f"{name}: {attempt()}")
    except OSError as error:
        pages.append(f"{name}: {errno.errorcode[error.errno]}")
os.write(1, json.dumps({"pages": pages}).encode())
os._exit(0)
"""
    code = "import json\n" + CONFINED.format(before="", after=after)
    file = tmp_path / "rules.pdf"
    file.write_bytes(b"%PDF")
    with file.open("rb") as content:
        pages = pages_of(file, content.fileno(), [sys.executable, "-c", code])
    assert {page.partition(": ")[2] for page in pages} == {"EPERM"}, pages


@pytest.mark.skipif(os.geteuid() != 0, reason="it is not root")
def test_a_parser_that_root_starts_is_nobody(tmp_path: Path) -> None:
    status = "open('/proc/self/status').read()"
    before = "confinement.apply = lambda steps: None; confinement.LIMITS.pop(resource.RLIMIT_NOFILE)"
    after = f"import json; print(json.dumps({{'pages': [{status}]}}), flush=True)"
    file = tmp_path / "rules.pdf"
    file.write_bytes(b"%PDF")
    with file.open("rb") as content:
        [page] = pages_of(
            file, content.fileno(), [sys.executable, "-c", CONFINED.format(before=before, after=after)]
        )
    rows = dict(line.split(":\t", 1) for line in page.splitlines() if ":\t" in line)
    assert set(rows["Uid"].split()) == set(rows["Gid"].split()) == {"65534"}
    assert int(rows["CapEff"], 16) == int(rows["CapPrm"], 16) == 0
    assert not rows["Groups"].strip()


def test_a_parser_gets_nothing_of_its_callers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    file = tmp_path / "rules.pdf"
    file.write_bytes(b"%PDF")
    code = "import json, os; print(json.dumps({'pages': sorted(os.environ)}))"
    with file.open("rb") as content:
        assert "SECRET" not in pages_of(file, content.fileno(), [sys.executable, "-c", code])


def test_the_command_and_the_gateway_load_no_parser() -> None:
    code = "import sys, llmserve.cli, llmserve.gateway.process; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"openpyxl", "pypdfium2", "selectolax"} & set(modules)
