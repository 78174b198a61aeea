"""The schema of `data.yaml`. Each section is part of its step's cache key, so a changed value re-runs that step."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from llmcore.config import Section
from llmtrain.data.cleaning_rules import CLEANING, compiled

Share = Annotated[float, Field(ge=0, le=1)]
Format = Literal["auto", "jsonl", "text", "html", "parquet", "csv"]
Text = Annotated[str, Field(min_length=1)]


class Input(Section):
    """Files of one kind: a file, a directory (recursively) or a pattern like `/srv/raw/**/*.jsonl.gz`."""

    path: str
    format: Format = "auto"  # by the extension before .gz, .bz2, .xz or .zst
    documents: Literal["file", "line"] = "file"  # the unit of a document in plain text
    text: str = "text"  # field or column of the text in JSONL, Parquet and CSV
    messages: str = "messages"  # that of a conversation
    id: str | None = None  # that of an id; default: path and position in the file
    encoding: Literal["utf-8", "gb18030", "utf-16"] = "utf-8"
    domain: str | None = None  # of all documents of this input


class Reading(Section):
    """How files are divided into shards, and how broken ones are handled."""

    shard_mb: PositiveInt = 64  # a worker processes a shard at a time; a kill loses at most that
    document_mb: PositiveInt = 16  # larger documents are rejected
    broken_text: Literal["reject", "replace"] = "reject"  # bytes that are invalid in the encoding
    broken_file: Literal["refuse", "skip"] = "refuse"  # truncated, or in another format


class OwnRule(Section):
    """A custom rule: a Python regular expression and the replacement of its matches."""

    name: str
    pattern: str
    replace: str = ""

    @field_validator("pattern")
    @classmethod
    def is_a_pattern(cls, value: str) -> str:
        """The pattern has to be a valid regular expression."""
        return compiled(value).pattern


class Clean(Section):
    """Rules by name, applied in this order (see `cleaning_rules.py`), then custom rules."""

    unicode: Literal["none", "NFC", "NFKC"] = "NFC"  # NFKC also turns Chinese punctuation into ASCII
    rules: tuple[str, ...] = ("newlines", "control", "invisible", "urls", "whitespace", "blank_lines")
    own: tuple[OwnRule, ...] = ()

    @field_validator("rules")
    @classmethod
    def are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """The rules have to exist."""
        unknown = sorted(set(value) - CLEANING.keys())
        if unknown:
            raise ValueError(f"there are no rules {', '.join(unknown)}: choose from {', '.join(CLEANING)}")
        return value


class Domain(Section):
    """A domain, and how its documents are recognized."""

    name: str = Field(min_length=1)
    paths: tuple[str, ...] = ()  # patterns for the path of the source, such as */legal/*
    keywords: tuple[Text, ...] = ()


class Annotate(Section):
    """Language and domain of each document."""

    domains: tuple[Domain, ...] = ()
    keywords_per_1000: float = Field(1.0, ge=0)  # minimum of a domain's keywords per 1000 characters
    classifier: Path | None = None  # directory of a transformers model whose labels are domains
    sure: Share = 0.5  # minimum probability of a label


class Quality(Section):
    """Limits that a document has to meet."""

    min_letters: NonNegativeInt = 20
    max_letters: PositiveInt = 5_000_000
    max_symbols: Share = 0.5  # characters that are neither letters nor digits
    max_repeated_lines: Share = 0.5
    min_compressed: Share = 0.08  # compressed size by zlib, relative to the text
    languages: tuple[str, ...] = ()  # allowed languages, by the codes of `annotate.py`; empty: all
    drop_domains: tuple[str, ...] = ()


Action = Literal["replace", "drop", "keep"]


class Personal(Section):
    """The action for each kind of personal data, and for credentials."""

    email: Action = "replace"
    phone: Action = "replace"
    ip: Action = "replace"
    resident_id: Action = "replace"
    card: Action = "replace"
    account: Action = "replace"
    credential: Action = "replace"


class Near(Section):
    """MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3).

    Two documents whose shingles have Jaccard similarity s share a band with probability 1 - (1 - s**rows)**bands; with
    the defaults it is a half at s = 0.69.
    """

    bands: PositiveInt = 14
    rows: PositiveInt = 8  # hashes per band
    words: PositiveInt = 5  # per shingle; a Chinese character is a word
    seed: NonNegativeInt = 1


class Duplicates(Section):
    """The first of several duplicates is kept, in the order of inputs, paths and positions."""

    exact: bool = True
    near: Near | None = Near()
    memory_mb: PositiveInt = 256  # of a worker for comparisons; does not change the result


class Decontaminate(Section):
    """The evaluation set, which must not be in the training data."""

    against: tuple[Input, ...] = Field(min_length=1)
    words: PositiveInt = 13  # length of a run that counts as contamination
    shortest: PositiveInt = 8  # evaluation documents with fewer words are ignored


class Pack(Section):
    """How documents are packed into rows."""

    seq_len: PositiveInt = 4096
    packed: bool = True  # several documents per row, by best fit; else one
    long: Literal["split", "drop"] = "split"  # documents longer than a row
    shard_tokens: PositiveInt = 8_388_608  # approximate tokens per file


class Settings(Section):
    """One data set, from raw files to rows."""

    inputs: tuple[Input, ...] = Field(min_length=1)
    output: Path
    work: Path  # intermediate results; as large as the text, and safe to delete
    reading: Reading = Reading()
    clean: Clean = Clean()
    annotate: Annotate = Annotate()
    quality: Quality | None = Quality()
    personal: Personal | None = Personal()
    duplicates: Duplicates = Duplicates()
    decontaminate: Decontaminate | None = None
    tokenizer: Path  # directory of the model
    pack: Pack = Pack()
    reject_text: bool = False  # also write the text of rejected documents to the reject file
