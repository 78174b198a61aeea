"""The text of an XLSX file: a page for each visible sheet, headed by its name; a line for each row, with cells separated by tabs.

Hidden sheets, rows and columns are dropped, as are comments and macros. A formula gives the value that was last computed.
"""

import warnings
import zipfile
import zlib
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from io import BytesIO
from xml.etree.ElementTree import ParseError

from openpyxl import load_workbook
from openpyxl.utils import column_index_from_string
from openpyxl.utils.exceptions import InvalidFileException
from openpyxl.worksheet.worksheet import Worksheet

from llmserve.documents.parsers import MOST_PAGES, Reason, Unreadable
from llmserve.documents.parsers.archive import opened


def text_of(value: object) -> str:
    """A cell's value as text. Dates are ISO 8601."""
    match value:
        case None:
            return ""
        case float() if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        case datetime() if value.time() == time():
            return value.date().isoformat()
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return str(value)
    return " ".join(str(value).split())


def hidden_columns(sheet: Worksheet) -> set[int]:
    return {
        number
        for letter, column in sheet.column_dimensions.items()
        if column.hidden
        for number in range(column.min or column_index_from_string(letter), (column.max or 0) + 1)
    }


def lines(sheet: Worksheet) -> Iterator[str]:
    """The rows that are visible and not empty."""
    without = hidden_columns(sheet)
    for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
        if number in sheet.row_dimensions and sheet.row_dimensions[number].hidden:
            continue
        line = "\t".join(text_of(value) for column, value in enumerate(row, 1) if column not in without)
        if line.strip():
            yield line.rstrip()


def pages(data: bytes) -> Iterator[str]:
    """The text of each sheet; raises Unreadable."""
    opened(data).close()
    try:
        with warnings.catch_warnings(action="ignore"):
            book = load_workbook(BytesIO(data), data_only=True, keep_links=False)
    except (
        InvalidFileException,
        KeyError,
        ValueError,
        TypeError,
        ParseError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        raise Unreadable(Reason.BROKEN) from None
    if len(book.worksheets) > MOST_PAGES:
        raise Unreadable(Reason.PAGES)
    for sheet in book.worksheets:
        if sheet.sheet_state == "visible":
            yield "\n".join([sheet.title, *lines(sheet)])
