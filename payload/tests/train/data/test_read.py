"""Reading: each format, each compression, and damaged files."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data_set import sentence, write_lines
from pyarrow import parquet

from llmtrain.data.documents import Document, Rejects
from llmtrain.data.read import Read
from llmtrain.data.settings import Input, Reading
from llmtrain.data.sources import line_ranges, shards_of
from llmtrain.exits import Refusal

COMPRESSIONS = pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
SAID = [f"{sentence(number)} 中文第{number}句。" for number in range(20)]


def read(root: Path, path: Path, given: dict[str, Any] | None = None, **reading: Any) -> list[Document]:
    """The documents of a path; rejects are in `root/rejects`."""
    own, options = Input.model_validate({"path": str(path), **(given or {})}), Reading.model_validate(reading)
    shards = shards_of([own], options.shard_mb)
    step = Read([own], options, Rejects(root / "rejects"))
    return [document for rank, shard in enumerate(shards) for document in step(shard, rank, len(shards))]


def rules(root: Path) -> list[str]:
    """The rules by which documents were rejected."""
    paths = sorted((root / "rejects").glob("*.jsonl"))
    return [json.loads(line)["rule"] for path in paths for line in path.read_text().splitlines()]


def jsonl() -> bytes:
    """The texts as JSONL."""
    return "".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in SAID).encode()


def table(delimiter: str) -> bytes:
    """The texts as CSV, with a newline and quotes in a field."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["no", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({"no": number, "text": each} for number, each in enumerate(SAID))
    return file.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", jsonl()), ("a.csv", table(",")), ("a.tsv", table("\t"))],
    ids=["jsonl", "csv", "tsv"],
)
def test_records_are_read_as_they_were_written(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [each.text for each in read(tmp_path, tmp_path / name)] == SAID


@COMPRESSIONS
def test_compressed_files_say_the_same(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(jsonl()))
    assert [each.text for each in read(tmp_path, path)] == SAID


def test_zstd_and_parquet_say_the_same(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": SAID, "more": SAID}), tmp_path / "a.parquet")
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(jsonl())
    assert [each.text for each in read(tmp_path, tmp_path / "a.parquet")] == SAID
    assert [each.text for each in read(tmp_path, tmp_path / "a.jsonl.zst")] == SAID


@COMPRESSIONS
def test_a_file_that_is_cut_short_is_no_end_of_file(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    whole = compress(jsonl())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refusal, match=r"a.jsonl.* cannot be read to its end as jsonl: .*fetch it again"):
        read(tmp_path, path)
    assert len(read(tmp_path, path, broken_file="skip")) < len(SAID)
    assert rules(tmp_path) == ["broken_file"]


def test_a_parquet_or_zstd_that_is_cut_short_is_no_end_of_file(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": SAID}), tmp_path / "a.parquet")
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(jsonl())
    for name in ("a.parquet", "a.jsonl.zst"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(Refusal, match="cannot be read to its end"):
            read(tmp_path, path)


def test_a_page_is_read_without_its_scripts_and_menus(tmp_path: Path) -> None:
    page = """<html><head><title>T</title><style>b{}</style></head><body><nav>Home</nav><h1>Über&nbsp;uns</h1>
    <p>One <b>bold</b> word.<script>alert(1)</script></p><p>中文</p></body></html>"""
    (tmp_path / "a.html").write_text(page)
    [document] = read(tmp_path, tmp_path / "a.html")
    assert document.text.split("\n") == ["Über\xa0uns", "One bold word.", "中文"]


def test_a_page_whose_menu_is_not_closed_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<body><nav>Home<p>One paragraph.</p><p>And another one.</p></body>")
    [document] = read(tmp_path, tmp_path / "a.html")
    assert document.text.endswith("One paragraph.\nAnd another one.")


def test_ranges_of_a_big_file_have_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl())
    for limit in (1, 7, 300, 301, 5000, 1 << 20):
        ranges = list(line_ranges(path, limit))
        raw = path.read_bytes()
        assert b"".join(raw[start:end] for start, end in ranges) == raw
        assert all(raw[start:end].endswith(b"\n") for start, end in ranges)


def test_a_document_keeps_its_id_when_its_file_is_cut_otherwise(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": sentence(each, 2000)} for each in range(300)])
    assert path.stat().st_size > 3 << 20
    few, many = (read(tmp_path, path, shard_mb=size) for size in (64, 1))
    assert [(each.id, each.text) for each in many] == [(each.id, each.text) for each in few]


def test_broken_utf8_is_rejected_or_replaced_as_the_rule_says(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good one"}\n{"text": "b\xffad"}\n{"text": "half \\ud83d"}\n')
    assert [each.text for each in read(tmp_path, path)] == ["good one"]
    assert rules(tmp_path) == ["broken_text", "broken_text"]
    replaced = [each.text for each in read(tmp_path, path, broken_text="replace")]
    assert replaced == ["good one", "b\ufffdad", "half ?"]


def test_a_broken_row_of_a_table_does_not_end_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\ngood\nb\xffad\nagain\n")
    assert [each.text for each in read(tmp_path, tmp_path / "a.csv")] == ["good", "again"]
    assert rules(tmp_path) == ["broken_text"]


@pytest.mark.parametrize("size", [2 << 20, (1 << 20) + 1])
def test_a_gigantic_line_is_rejected_and_the_next_is_read(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * size + b'"}\n{"text": "next"}\n')
    assert [each.text for each in read(tmp_path, tmp_path / "a.jsonl", document_mb=1)] == ["next"]
    assert rules(tmp_path) == ["gigantic"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{bad", "no_json"),
        ("[1]", "no_object"),
        ('{"text": 1}', "no_text"),
        ('{"messages": []}', "no_messages"),
        ('{"messages": [{"role": "user"}]}', "no_messages"),
        ("[" * 100_000, "no_json"),
    ],
)
def test_a_line_that_is_no_document_is_rejected_by_its_rule(tmp_path: Path, line: str, rule: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + '\n{"text": "next"}\n')
    assert [each.text for each in read(tmp_path, tmp_path / "a.jsonl")] == ["next"]
    assert rules(tmp_path) == [rule]


def test_chinese_in_its_own_encoding_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("中文文本".encode("gb18030"))
    [document] = read(tmp_path, tmp_path / "a.txt", {"encoding": "gb18030"})
    assert document.text == "中文文本"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.xyz", "has an unknown extension"),
        ("none.jsonl", "which matches no file"),
        ("a.csv", "has columns a, b"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused_by_name(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.xyz").write_text("x")
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Refusal, match=said):
        read(tmp_path, tmp_path / name)
