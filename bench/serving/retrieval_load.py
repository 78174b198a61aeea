#!/usr/bin/env python
"""How long a search of documents takes with the filter of tenant and collections, and without; what adding documents costs.

A real Elasticsearch with the product's mapping gets CHUNKS passages: halves of passages of Debian's manual in English and
Chinese, recombined, with unit vectors that are the sum of one direction for each half and noise. Three tenants read 1, 10 and
50 % of them. Each question of retrieval_questions.tsv is asked by the product's two searches, without the filter and with each
of the three, in an order that rotates; what a filtered search returns is checked for passages that are not the caller's.

Adding is measured on the manual's English edition as text, HTML and PDF, whose pages are counted: reading and cutting by the
product's parsers, and embedding apart. Rates are of CPU time, so they are of one core. Run it by payload/.venv/bin/python.
"""

import argparse
import asyncio
import gzip
import json
import random
import resource
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "payload"), str(ROOT)]

import numpy as np  # noqa: E402
from elasticsearch import Elasticsearch  # noqa: E402
from elasticsearch.helpers import parallel_bulk  # noqa: E402
from llmserve.documents.extraction import text_of  # noqa: E402
from llmserve.documents.index import by_vector, by_words, entry, index_name, mapping  # noqa: E402
from llmserve.documents.passages import Language, Passage, language, normalized, passages  # noqa: E402
from llmserve.documents.retrieval import Retrieval, result  # noqa: E402
from llmserve.engine.embed import EmbedDriver  # noqa: E402
from llmserve.fast_json import serialize  # noqa: E402
from llmserve.protocol import Generate  # noqa: E402
from llmserve.settings import Documents, EmbedModel  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from retrieval import PACKAGES, Question, questions, sections  # noqa: E402
from search_server import SearchServer, search_server  # noqa: E402

ALIAS = "passages"
INDEX = index_name(ALIAS, 384, "bench")
PASSAGES_A_DOCUMENT = 20
NOISE = 0.7  # its length, where each of a passage's two directions has 1
BOOK = "tree/usr/share/doc/debian-reference-common/docs"
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Tenant:
    """`share`: of all passages; `collections`: how many it has, of which its caller reads the first `readable`."""

    name: str
    share: float
    collections: int
    readable: int

    @property
    def names(self) -> list[str]:
        return [f"{self.name}-{number}" for number in range(self.collections)]

    @property
    def readers_share(self) -> float:
        return self.share * self.readable / self.collections


TENANTS = [Tenant("small", 0.02, 8, 4), Tenant("medium", 0.2, 8, 4), Tenant("large", 0.75, 9, 6)]
OTHERS = [Tenant(f"other{number}", 0.01, 4, 0) for number in range(3)]


@dataclass(frozen=True)
class Corpus:
    """Passages of the manual by language, and a direction for each."""

    texts: dict[Language, list[str]]
    directions: dict[Language, Vector]

    def vector(self, language: Language, ids: Sequence[int], noise: Vector) -> Vector:
        """Of length 1, shape (dimensions,)."""
        sums = self.directions[language][list(ids)].sum(axis=0) + noise
        unit: Vector = sums / np.linalg.norm(sums)
        return unit


@dataclass
class Times:
    """Seconds of requests, and milliseconds of both searches as Elasticsearch states them."""

    seconds: list[float] = field(default_factory=list)
    took: list[tuple[int, int]] = field(default_factory=list)

    def percentile(self, percent: int) -> float:
        return float(np.percentile(self.seconds, percent)) * 1000


def corpus(scratch: Path, dimensions: int) -> Corpus:
    generator = np.random.default_rng(1)
    texts = {
        language: [
            piece.text
            for piece in passages(normalized("\f".join(sections(scratch, language).values())))
            if len(piece.text) > 40
        ]
        for language in PACKAGES
    }
    directions: dict[Language, Vector] = {}
    for name, each in texts.items():
        vectors = generator.standard_normal((len(each), dimensions), np.float32)
        directions[name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Corpus(texts, directions)


def halves(first: str, second: str) -> str:
    """The first half of one text, and the second half of another one."""
    return first[: len(first) // 2] + second[len(second) // 2 :]


def actions(source: Corpus, chunks: int) -> Iterator[dict[str, Any]]:
    """The passages, as `documents add` stores them but for the vectors, which are in base64: Elasticsearch reads it faster."""
    choice = random.Random(2)  # noqa: S311 - no secret
    generator = np.random.default_rng(2)
    everyone = TENANTS + OTHERS
    shares = [tenant.share for tenant in everyone]
    dimensions = source.directions["en"].shape[1]
    scale = NOISE / dimensions**0.5
    for number in range(-(-chunks // PASSAGES_A_DOCUMENT)):
        [tenant] = choice.choices(everyone, shares)
        document = f"{number:032x}"
        shared = {
            "tenant": tenant.name,
            "collection": choice.choice(tenant.names),
            "document": document,
            "revision": f"{number:064x}",
            "name": f"{number}.txt",
            "total": PASSAGES_A_DOCUMENT,
            "added": "2026-01-01T00:00:00+00:00",
        }
        tongue = choice.choice(sorted(source.texts))
        texts = source.texts[tongue]
        noise = generator.standard_normal((PASSAGES_A_DOCUMENT, dimensions), np.float32) * scale
        for at in range(min(PASSAGES_A_DOCUMENT, chunks - number * PASSAGES_A_DOCUMENT)):
            first, second = choice.randrange(len(texts)), choice.randrange(len(texts))
            text = halves(texts[first], texts[second])
            vector = source.vector(tongue, (first, second), noise[at])
            source_fields = entry(shared, Passage(at, 1, at * 800, at * 800 + len(text), text), [])
            encoded = b64encode(vector.astype(">f4").tobytes()).decode()
            yield {
                "_index": INDEX,
                "_id": f"{document}-{document[:16]}-{at}",
                "_source": source_fields | {"vector": encoded},
            }


def load(server: SearchServer, source: Corpus, chunks: int, dimensions: int) -> None:
    client = Elasticsearch(f"http://127.0.0.1:{server.port}", request_timeout=600)
    settings = mapping(dimensions)
    server.do("PUT", f"/{INDEX}", settings | {"aliases": {ALIAS: {}}})
    server.do("PUT", f"/{INDEX}/_settings", {"index": {"refresh_interval": "60s"}})
    start = time.monotonic()
    for number, (success, answer) in enumerate(
        parallel_bulk(client, actions(source, chunks), thread_count=2, chunk_size=500), 1
    ):
        assert success, answer
        if number % 20000 == 0:
            print(f"{number:,} passages after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    client.indices.refresh(index=INDEX)
    while merging := client.indices.stats(index=INDEX, metric="merge")["_all"]["total"]["merges"]["current"]:
        print(f"{merging} merges are under way", file=sys.stderr, flush=True)
        time.sleep(5)
    seconds = time.monotonic() - start
    stored = client.count(index=INDEX)["count"]
    assert stored == chunks, (stored, chunks)
    print(f"{stored:,} passages in {seconds:.0f} s with all merges, {stored / seconds:.0f} a second")
    print_index(client)


def print_index(client: Elasticsearch) -> None:
    total = client.indices.stats(index=INDEX, metric=["store", "segments"])["_all"]["total"]
    field = client.indices.get_mapping(index=INDEX)[INDEX]["mappings"]["properties"]["vector"]
    size = total["store"]["size_in_bytes"]
    kind = field.get("index_options", {}).get("type")
    print(
        f"index: {size / 1e9:.2f} GB, {total['segments']['count']} segments, vectors of {field['dims']}: {kind}"
    )


async def search(
    retrieval: Retrieval, question: Question, vector: Sequence[float], tenant: Tenant | None, times: Times
) -> None:
    """Ask as a gateway does, without the filter where there is no tenant."""
    asked = tenant or TENANTS[0]
    collections = asked.names[: asked.readable]
    start = time.perf_counter()
    words, nearest = (
        by_words(asked.name, collections, question.text),
        by_vector(asked.name, collections, vector),
    )
    if tenant is None:
        del words["query"]["bool"]["filter"], nearest["knn"]["filter"]
    answers = await retrieval.answers(
        b"".join(b"{}\n" + serialize(each) + b"\n" for each in (words, nearest))
    )
    times.seconds.append(time.perf_counter() - start)
    times.took.append((answers[0]["took"], answers[1]["took"]))
    if tenant is not None:
        hits = result(answers, tenant.name, collections, 10, INDEX, language(question.text)).hits
        assert len(hits) == 10


async def measure(server: SearchServer, source: Corpus, rounds: int) -> dict[str, Times]:
    settings = Documents(url=f"http://127.0.0.1:{server.port}", index=ALIAS, model="bench")
    retrieval = Retrieval(settings, None)
    generator, choice = np.random.default_rng(3), random.Random(3)  # noqa: S311 - no secret
    cases: list[Tenant | None] = [None, *TENANTS]
    times = {case.name if case else "none": Times() for case in cases}
    dimensions = source.directions["en"].shape[1]
    for turn in range(rounds + 1):
        for number, question in enumerate(questions()):
            at = choice.randrange(len(source.texts[question.language]))
            noise = generator.standard_normal(dimensions, np.float32) * (NOISE / dimensions**0.5)
            vector = [float(each) for each in source.vector(question.language, [at], noise)]
            for offset in range(len(cases)):
                case = cases[(number + offset) % len(cases)]
                record = times[case.name if case else "none"] if turn else Times()  # the first round warms up
                await search(retrieval, question, vector, case, record)
    return times


def report(times: dict[str, Times]) -> None:
    without = times["none"]
    for name, each in times.items():
        share = next((tenant.readers_share for tenant in TENANTS if tenant.name == name), None)
        words, nearest = np.array(each.took).T
        median, slowest = (each.percentile(percent) / without.percentile(percent) for percent in (50, 99))
        ratios = f"  ratios {median:.2f}, {slowest:.2f}"
        print(
            f"{'no filter' if share is None else f'{share:.0%} readable':13} p50 {each.percentile(50):6.1f} ms  "
            f"p99 {each.percentile(99):6.1f} ms{'' if share is None else ratios}  "
            f"of it words {np.median(words):.0f} ms, vectors {np.median(nearest):.0f} ms in the median"
        )
    print(f"{len(without.seconds)} requests each")


def cpu() -> float:
    """Of this process and those that it has waited for, in seconds."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def ingest(scratch: Path, model: Path) -> None:
    """Read and cut the manual in three formats, and embed some of its passages."""
    folder = scratch / BOOK
    text = scratch / "debian-reference.txt"
    text.write_bytes(gzip.decompress((folder / "debian-reference.en.txt.gz").read_bytes()))
    book = folder / "debian-reference.en.pdf"
    pages = text_of(book).count("\f") + 1
    formats = {"text": [text], "HTML": sorted(folder.glob("ch*.en.html")), "PDF": [book]}
    for name, files in formats.items():
        start = cpu()
        texts = [text_of(file) for file in files]
        read = cpu() - start
        pieces = [piece.text for text in texts for piece in passages(normalized(text))]
        seconds = cpu() - start
        print(
            f"{name}: {pages} pages in {len(files)} files, {len(pieces)} passages, {seconds:.2f} s of CPU, "
            f"{read:.2f} of it to read; {pages / seconds:.0f} pages/s a core",
            flush=True,
        )
    driver = EmbedDriver(
        EmbedModel(driver="embed", path=model, manifest=model / "MANIFEST.sha256", threads=1), "bench"
    )
    start = cpu()
    sample = pieces[:: max(1, len(pieces) // 64)]
    for at in range(0, len(sample), 32):
        driver.run(Generate(0, False, 0, inputs=sample[at : at + 32]), threading.Event())
    rate = len(sample) / (cpu() - start)
    print(
        f"embedding: {len(sample)} of {len(pieces)} passages of the PDF, {rate:.1f} passages/s a core, "
        f"{rate * pages / len(pieces):.1f} pages/s a core"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder for Debian's packages, made if missing"
    )
    parser.add_argument(
        "--model", type=Path, help="folder of an encoder in safetensors: measure adding alone"
    )
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=2, help="of all questions, after one that warms up")
    parser.add_argument("--heap", default="4g", help="Elasticsearch's, as Java writes it")
    parser.add_argument("--json", type=Path, help="file for all times")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    source = corpus(options.scratch, options.dimensions)
    if options.model:
        ingest(options.scratch, options.model)
        return
    with search_server(java_options=f"-Xms{options.heap} -Xmx{options.heap}") as server:
        load(server, source, options.chunks, options.dimensions)
        times = asyncio.run(measure(server, source, options.rounds))
    report(times)
    if options.json:
        options.json.write_text(json.dumps({name: [each.seconds, each.took] for name, each in times.items()}))


if __name__ == "__main__":
    main()
