"""What `data.yaml` may say. Each step's section is part of its cache key, so a changed value re-runs that step."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from llmcore.config import Section
from llmtrain.data.cleaning_rules import CLEANING, compiled

Share = Annotated[float, Field(ge=0, le=1)]
Format = Literal["auto", "jsonl", "text", "html", "parquet", "csv"]
Text = Annotated[str, Field(min_length=1)]


class Input(Section):
    """Files of one kind: a file, a directory (with all below it) or a pattern like `/srv/raw/**/*.jsonl.gz`."""

    path: str
    format: Format = "auto"  # by the name's ending, before .gz, .bz2, .xz or .zst
    documents: Literal["file", "line"] = "file"  # what a document is in plain text
    text: str = "text"  # JSONL, Parquet, CSV: the field or column
    messages: str = "messages"  # and that of a conversation
    id: str | None = None  # and that of an id; default: the file's path and the place in it
    encoding: Literal["utf-8", "gb18030", "utf-16"] = "utf-8"
    domain: str | None = None  # of all these documents


class Reading(Section):
    """How files are cut into shards of work, and what is done about broken ones."""

    shard_mb: PositiveInt = 64  # a shard is what a kill may lose, and what a worker has at a time
    document_mb: PositiveInt = 16  # a larger document is rejected
    broken_text: Literal["reject", "replace"] = "reject"  # bytes that the encoding does not have
    broken_file: Literal["refuse", "skip"] = "refuse"  # cut short, or not what its name says


class OwnRule(Section):
    """A rule of your own: Python's regular expression and what takes the place of a match."""

    name: str
    pattern: str
    replace: str = ""

    @field_validator("pattern")
    @classmethod
    def is_a_pattern(cls, value: str) -> str:
        """One that Python can compile."""
        return compiled(value).pattern


class Clean(Section):
    """Rules by name, applied in this order (see `cleaning_rules.py`), then your own."""

    unicode: Literal["none", "NFC", "NFKC"] = "NFC"  # NFKC also turns Chinese punctuation into ASCII
    rules: tuple[str, ...] = ("newlines", "control", "invisible", "urls", "whitespace", "blank_lines")
    own: tuple[OwnRule, ...] = ()

    @field_validator("rules")
    @classmethod
    def are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Every name stands in the table."""
        unknown = sorted(set(value) - CLEANING.keys())
        if unknown:
            raise ValueError(f"no such rule: {', '.join(unknown)}; there are {', '.join(CLEANING)}")
        return value


class Domain(Section):
    """A domain, and how its documents are known."""

    name: str = Field(min_length=1)
    paths: tuple[str, ...] = ()  # patterns of the source's path, as in */legal/*
    keywords: tuple[Text, ...] = ()


class Annotate(Section):
    """Language and domain, noted with each document."""

    domains: tuple[Domain, ...] = ()
    keywords_per_1000: float = Field(1.0, ge=0)  # of a domain, in 1000 letters, at least
    classifier: Path | None = None  # a transformers model's directory; its labels are domains
    sure: Share = 0.5  # the least probability that counts


class Quality(Section):
    """Rules that a text has to keep."""

    min_letters: NonNegativeInt = 20
    max_letters: PositiveInt = 5_000_000
    max_symbols: Share = 0.5  # signs that are neither letters nor digits
    max_repeated_lines: Share = 0.5
    min_compressed: Share = 0.08  # what zlib leaves of it
    languages: tuple[str, ...] = ()  # only these; none: all. See `annotate.py`
    drop_domains: tuple[str, ...] = ()


Action = Literal["replace", "drop", "keep"]


class Personal(Section):
    """What is done about each kind of personal data."""

    email: Action = "replace"
    phone: Action = "replace"
    ip: Action = "replace"
    resident_id: Action = "replace"
    card: Action = "replace"


class Near(Section):
    """MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3).

    Two documents whose shingles' Jaccard similarity is s meet in a band with probability 1 - (1 - s**rows)**bands: by
    default a half at s = 0.69.
    """

    bands: PositiveInt = 14
    rows: PositiveInt = 8  # hashes of a band
    words: PositiveInt = 5  # of a shingle; a Chinese sign is a word
    seed: NonNegativeInt = 1


class Duplicates(Section):
    """Of what is the same, the first goes on: in the order of inputs, paths and places."""

    exact: bool = True
    near: Near | None = Near()
    memory_mb: PositiveInt = 256  # that a worker takes to compare; does not change what is found


class Decontaminate(Section):
    """The evaluation set, of which nothing may be learned."""

    against: tuple[Input, ...] = Field(min_length=1)
    words: PositiveInt = 13  # in a row
    shortest: PositiveInt = 8  # an evaluation document with fewer is not looked for


class Pack(Section):
    """Rows for training."""

    seq_len: PositiveInt = 4096
    packed: bool = True  # several documents a row, by best fit; else one a row
    long: Literal["split", "drop"] = "split"  # what is longer than a row
    shard_tokens: PositiveInt = 8_388_608  # about so many tokens a file


class Settings(Section):
    """One data set, from raw files to rows."""

    inputs: tuple[Input, ...] = Field(min_length=1)
    output: Path
    work: Path  # what is done so far; as large as the text, and yours to delete
    reading: Reading = Reading()
    clean: Clean = Clean()
    annotate: Annotate = Annotate()
    quality: Quality | None = Quality()
    personal: Personal | None = Personal()
    duplicates: Duplicates = Duplicates()
    decontaminate: Decontaminate | None = None
    tokenizer: Path  # the model's directory
    pack: Pack = Pack()
    reject_text: bool = False  # dropped documents' text in the reject file
