"""The text of a PDF's pages by PDFium. Annotations, forms' scripts, attachments and metadata are not read."""

import codecs
import ctypes
from collections.abc import Iterator

import pypdfium2.raw as pdfium
from pypdfium2 import PdfDocument, PdfiumError, PdfPage

from llmserve.documents.parsers import MOST_PAGES, Reason, Unreadable

LEAST_SIZE = 1.0  # points
INVISIBLE = {pdfium.FPDF_TEXTRENDERMODE_INVISIBLE, pdfium.FPDF_TEXTRENDERMODE_CLIP}
DEPTH = 64  # of forms within forms
codecs.lookup("utf-16-le")  # PDFium's; loaded while files can be opened


def is_hidden(text: pdfium.FPDF_PAGEOBJECT) -> bool:
    """Whether a text is drawn invisibly, without opacity, or too small to be read."""
    if pdfium.FPDFTextObj_GetTextRenderMode(text) in INVISIBLE:
        return True
    red, green, blue, alpha = (ctypes.c_uint(255) for _ in range(4))
    pdfium.FPDFPageObj_GetFillColor(text, red, green, blue, alpha)
    size, matrix = ctypes.c_float(LEAST_SIZE), pdfium.FS_MATRIX(1, 0, 0, 1, 0, 0)
    pdfium.FPDFTextObj_GetFontSize(text, size)
    pdfium.FPDFPageObj_GetMatrix(text, matrix)
    scale = abs(matrix.a * matrix.d - matrix.b * matrix.c) ** 0.5
    return alpha.value == 0 or abs(size.value) * scale < LEAST_SIZE


def visible_text(page: PdfPage) -> str:
    """The text within the page's visible box."""
    for text in list(page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_TEXT], max_depth=DEPTH)):
        if not is_hidden(text.raw):
            continue
        if text.container is None:
            page.remove_obj(text)
        elif not pdfium.FPDFFormObj_RemoveObject(text.container.raw, text.raw):
            raise Unreadable(Reason.BROKEN)
    content = page.get_textpage()
    # Hyphens at the end of a line are control characters here, which are dropped later.
    lines: str = content.get_text_bounded().replace("\ufffe", "")
    content.close()
    return lines


def pages(data: bytes) -> Iterator[str]:
    """The text of each page; raises Unreadable."""
    try:
        document = PdfDocument(data)
        if len(document) > MOST_PAGES:
            raise Unreadable(Reason.PAGES)
        for page in document:
            yield visible_text(page)
            page.close()
    except PdfiumError as error:
        encrypted = error.err_code in (pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY)
        raise Unreadable(Reason.ENCRYPTED if encrypted else Reason.BROKEN) from None
