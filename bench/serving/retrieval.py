#!/usr/bin/env python
"""Measures retrieval quality: nDCG@10 and recall@20 of BM25, kNN and both fused, in English and in Chinese, and which questions
the similarity threshold considers answerable.

The corpora are Debian's packages debian-reference-en and debian-reference-zh-cn, fetched by apt below SCRATCH. A page is a
section of the manual. The questions of retrieval_questions.tsv were written from its table of contents and text before
anything was measured; each names the sections that answer it, or `-`. A hash divides them into a half for tuning and a half for
publication. The searches are those of gateways, in a real Elasticsearch; a section is as good as its best passage. Measures are
those of ir-measures (`make peers PEER=retrieval`). Run it by payload/.venv/bin/python.
"""

import argparse
import gzip
import hashlib
import json
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "payload"), str(ROOT)]

import numpy as np  # noqa: E402
from llmserve.documents import index  # noqa: E402
from llmserve.documents.passages import TOKENS, Language, normalized, passages  # noqa: E402
from llmserve.engine.embed import EmbedDriver  # noqa: E402
from llmserve.protocol import Generate  # noqa: E402
from llmserve.settings import EmbedModel  # noqa: E402
from search_server import SearchServer, search_server  # noqa: E402

PACKAGES: dict[Language, str] = {"en": "debian-reference-en", "zh": "debian-reference-zh-cn"}
COMMON = "debian-reference-common"
TEXTS = "usr/share/doc/debian-reference-common/docs/debian-reference.{}.txt.gz"
CHAPTER = {"en": r"Chapter\s(\d+)\.", "zh": r"第\s*(\d+)\s*章"}
APPENDIX = {"en": "Appendix A", "zh": "附录 A"}
SECTION = re.compile(r"(\d+(?:\.\d+)+)\.\s+\S")
MEASURES = ("nDCG@10", "R@20")
BATCH = 32
TENANT = "bench"
PYTHON = ROOT / "bench/.venv-retrieval/bin/python"
BY_IR_MEASURES = """
import json, sys, ir_measures
task = json.load(sys.stdin)
measures = [ir_measures.parse_measure(name) for name in task["measures"]]
print(json.dumps([{str(name): value for name, value in ir_measures.calc_aggregate(measures, task["qrels"], run).items()}
                  for run in task["runs"]]))
"""


@dataclass(frozen=True)
class Question:
    """`sections`: those that answer it; none where the corpus has no answer. `tuning`: of the half to tune on."""

    language: Language
    sections: frozenset[str]
    text: str

    @property
    def tuning(self) -> bool:
        return hashlib.sha256(self.text.encode()).digest()[0] % 2 == 0


@dataclass(frozen=True)
class Ranked:
    """The passages of both searches for a question, as sections, and the similarity of the nearest one."""

    question: Question
    words: list[str]
    vectors: list[str]
    similarity: float


def questions() -> list[Question]:
    lines = (ROOT / "bench/serving/retrieval_questions.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return [
        Question("zh" if language == "zh" else "en", frozenset(names.split()) - {"-"}, text)
        for language, names, text in rows
    ]


def sections(scratch: Path, language: Language) -> dict[str, str]:
    """The text of each section by its number, from Debian's package."""
    tree = scratch / "tree"
    for package in (PACKAGES[language], COMMON):
        if not list(scratch.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "--quiet=2", "download", package], cwd=scratch, check=True)
        (archive,) = scratch.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "--extract", archive, tree], check=True)
    suffix = PACKAGES[language].removeprefix("debian-reference-")
    text = gzip.decompress((tree / TEXTS.format(suffix)).read_bytes()).decode()
    lines: dict[str, list[str]] = {}
    number = ""
    for line in text.splitlines():
        if chapter := re.match(CHAPTER[language], line):
            number = chapter[1]
        elif number and line.startswith(APPENDIX[language]):
            break
        elif (section := SECTION.match(line)) and section[1].split(".")[0] == number.split(".")[0]:
            number = section[1] if section[1] not in lines else number
        if number:
            lines.setdefault(number, []).append(line)
    return {name: "\n".join(each) for name, each in lines.items()}


class Vectors:
    """Our engine's vectors, kept in SCRATCH by the text's hash."""

    def __init__(self, scratch: Path, model: Path) -> None:
        settings = EmbedModel(driver="embed", path=model, manifest=model / "MANIFEST.sha256", threads=1)
        self.driver = EmbedDriver(settings, "bench")
        self.rows = sqlite3.connect(scratch / f"{model.name}.sqlite")
        self.rows.execute("CREATE TABLE IF NOT EXISTS v (h TEXT PRIMARY KEY, v BLOB)")

    def of_texts(self, purpose: str, texts: Sequence[str]) -> list[list[float]]:
        prompt = getattr(self.driver, "prompts", {}).get(purpose, "")
        names = [hashlib.sha256((prompt + text).encode()).hexdigest() for text in texts]
        stored = {name for (name,) in self.rows.execute("SELECT h FROM v")}
        todo = {name: prompt + text for name, text in zip(names, texts, strict=True) if name not in stored}
        for start in range(0, len(todo), BATCH):
            batch = sorted(todo, key=lambda name: len(todo[name]))[start : start + BATCH]
            request = Generate(0, False, 0, inputs=[todo[name] for name in batch])
            data = json.loads(self.driver.run(request, threading.Event())[0])
            rows = [
                (name, np.array(each["embedding"], "<f4").tobytes())
                for name, each in zip(batch, data, strict=True)
            ]
            self.rows.executemany("INSERT INTO v VALUES (?, ?)", rows)
            self.rows.commit()
        return [[float(each) for each in np.frombuffer(self.row(name), "<f4")] for name in names]

    def row(self, name: str) -> bytes:
        (blob,) = self.rows.execute("SELECT v FROM v WHERE h = ?", (name,)).fetchone()
        return bytes(blob)


def fill(
    server: SearchServer, language: Language, texts: dict[str, str], vectors: Vectors, limit: int
) -> list[str]:
    """Add a corpus as a collection named by its language; returns the section of each page."""
    pages = list(texts)
    whole = normalized("\f".join(texts.values()))
    pieces = list(passages(whole, limit))
    shared: dict[str, Any] = {
        "tenant": TENANT,
        "collection": language,
        "document": language,
        "revision": "r",
        "name": language,
    }
    shared |= {"total": len(pieces), "added": "2026-01-01T00:00:00+00:00"}
    embedded = vectors.of_texts("document", [piece.text for piece in pieces])
    bulk(server, (index.entry(shared, piece, vector) for piece, vector in zip(pieces, embedded, strict=True)))
    return pages


def bulk(server: SearchServer, entries: Iterable[dict[str, Any]], name: str = "passages") -> None:
    lines: list[str] = []
    for number, entry in enumerate(entries):
        where = {"_index": name, "_id": f"{entry['collection']}-{number}"}
        lines += [json.dumps({"index": where}), json.dumps(entry)]
        if len(lines) >= 1000:
            server.do("POST", "/_bulk", "\n".join(lines) + "\n")
            lines = []
    if lines:
        server.do("POST", "/_bulk", "\n".join(lines) + "\n")
    server.do("POST", f"/{name}/_refresh")


def once_each(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def ranked(server: SearchServer, question: Question, pages: list[str], vector: list[float]) -> Ranked:
    """As a gateway asks."""
    both = (
        index.by_words(TENANT, [question.language], question.text),
        index.by_vector(TENANT, [question.language], vector),
    )
    lines = [line for search in both for line in ("{}", json.dumps(search))]
    answers = server.do("POST", "/passages/_msearch", "\n".join(lines) + "\n")["responses"]
    hits = [
        sorted(answer["hits"]["hits"], key=lambda hit: (-hit["_score"], hit["_id"])) for answer in answers
    ]
    names = [[pages[hit["_source"]["page"] - 1] + "#" + hit["_id"] for hit in each] for each in hits]
    return Ranked(question, names[0], names[1], hits[1][0]["_score"] * 2 - 1)


def by_section(ranking: Iterable[str]) -> dict[str, float]:
    """A run of ir-measures: sections by the place of their best passage."""
    names = once_each(name.partition("#")[0] for name in ranking)
    return {name: 1 / place for place, name in enumerate(names, 1)}


def measured(
    answers: Sequence[Ranked], runs: Sequence[dict[str, dict[str, float]]]
) -> list[dict[str, float]]:
    """The means of all measures, of each run."""
    qrels = {each.question.text: dict.fromkeys(each.question.sections, 1) for each in answers}
    task = json.dumps({"measures": MEASURES, "qrels": qrels, "runs": runs})
    output = subprocess.run(
        [PYTHON, "-c", BY_IR_MEASURES], input=task, text=True, capture_output=True, check=True
    )
    results: list[dict[str, float]] = json.loads(output.stdout)
    return results


def run_of(answers: Sequence[Ranked], which: str) -> dict[str, dict[str, float]]:
    def ranking(each: Ranked) -> list[str]:
        if which == "hybrid":
            return [name for name, _ in index.fused([each.words, each.vectors], each.question.language)]
        return each.words if which == "BM25" else each.vectors

    return {each.question.text: by_section(ranking(each)) for each in answers}


def table(answers: Sequence[Ranked]) -> None:
    """nDCG@10 and recall@20 by language and search."""
    for language in PACKAGES:
        ours = [each for each in answers if each.question.language == language and each.question.sections]
        kinds = ("BM25", "kNN", "hybrid")
        results = measured(ours, [run_of(ours, kind) for kind in kinds])
        for kind, result in zip(kinds, results, strict=True):
            print(f"{language}  {kind:7}" + "".join(f"  {name} {result[name]:.3f}" for name in MEASURES))
        scores = [result["nDCG@10"] for result in results]
        print(
            f"{language}  hybrid is {scores[2] / max(scores[:2]):.3f} of the better single one, {len(ours)} questions"
        )


def thresholds(answers: Sequence[Ranked], least: dict[Language, float]) -> None:
    """Shares of questions that the threshold misclassifies."""
    for language in PACKAGES:
        of_language = [each for each in answers if each.question.language == language]
        without = [each.similarity for each in of_language if not each.question.sections]
        having = [each.similarity for each in of_language if each.question.sections]
        accepted = sum(each >= least[language] for each in without) / len(without)
        rejected = sum(each < least[language] for each in having) / len(having)
        print(
            f"{language}  at {least[language]:.3f}: {accepted:.0%} of {len(without)} without an answer are accepted, "
            f"{rejected:.0%} of {len(having)} with one are rejected"
        )


def best_thresholds(answers: Sequence[Ranked]) -> dict[Language, float]:
    """By language, the one that mistakes the least share of both kinds together."""
    best: dict[Language, float] = {}
    for language in PACKAGES:
        ours = [each for each in answers if each.question.language == language]
        without = np.array([each.similarity for each in ours if not each.question.sections])
        having = np.array([each.similarity for each in ours if each.question.sections])
        places = np.unique(np.round(np.concatenate([without, having]), 3))
        costs = [(without >= place).mean() + (having < place).mean() for place in places]
        lowest = np.flatnonzero(np.isclose(costs, min(costs)))
        best[language] = float(places[lowest[len(lowest) // 2]])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of an encoder in safetensors")
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder for corpora and vectors, made if missing"
    )
    parser.add_argument("--half", choices=["tune", "publish"], default="publish")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a passage")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    vectors = Vectors(options.scratch, options.model)
    answers: list[Ranked] = []
    with search_server() as server:
        server.do("PUT", "/passages", index.mapping(vectors.driver.dimensions))
        for language in PACKAGES:
            texts = sections(options.scratch, language)
            pages = fill(server, language, texts, vectors, options.tokens)
            asked = [each for each in questions() if each.language == language]
            for each in asked:
                if unknown := each.sections - set(texts):
                    raise SystemExit(f"{each.text!r} names sections that {language} lacks: {sorted(unknown)}")
            queries = vectors.of_texts("query", [each.text for each in asked])
            answers += [
                ranked(server, each, pages, vector) for each, vector in zip(asked, queries, strict=True)
            ]
    tuning = [each for each in answers if each.question.tuning]
    chosen = tuning if options.half == "tune" else [each for each in answers if not each.question.tuning]
    table(chosen)
    thresholds(chosen, best_thresholds(tuning))
    if options.half == "tune":
        (options.scratch / "tune.json").write_text(
            json.dumps(
                [
                    [
                        each.question.text,
                        each.question.language,
                        sorted(each.question.sections),
                        each.words,
                        each.vectors,
                        each.similarity,
                    ]
                    for each in tuning
                ]
            )
        )


if __name__ == "__main__":
    main()
