"""The payload's parsers of foreign bytes, and the refusals that each declares."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from document_files import archive, relationships
from fuzzing import Target

from llmcore import ratings
from llmserve.api.errors import ApiError
from llmserve.api.requests import parse_body, undeclared
from llmserve.documents.parsers import Unreadable, web, word
from llmserve.feedback import guard, index, journal, ship
from llmserve.feedback.ratings import FeedbackBody
from llmserve.gateway import parsed_requests
from llmserve.http_client import BadAnswer, Connection, HttpClient, Lost, Response
from llmserve.protocol import Generate, Hello
from llmserve.settings import Remote
from llmserve.upstream.admission import Queue
from llmserve.upstream.openai_client import OpenAiClient, fields_of, http_request
from llmtrain import exits
from llmtrain.annotation.controls import Label, Labels
from llmtrain.annotation.judgements import Exported, Judged, found_in, read_file
from llmtrain.annotation.tasks import Item
from llmtrain.feedback import export

HELLO = Hello("m", "1", "vllm", 4096, 4, fields=["tools", "n"], template_arguments=["enable_thinking"])
SOCKET = Path("upstream.sock")
REQUEST = Generate(1, True, 16)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
KEY = b"the key of tests, of 32 letters."


def in_folder(parse: Callable[[Path, bytes], object]) -> Callable[[bytes], object]:
    """PARSE with an empty folder."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None

    def parse_in_folder(data: bytes) -> object:
        folder = Path(tempfile.mkdtemp(prefix="llmkeep-fuzz-", dir=memory))
        try:
            return parse(folder, data)
        finally:
            shutil.rmtree(folder)

    return parse_in_folder


def request_body(data: bytes) -> None:
    """The body of a request, as each endpoint reads it."""
    for read in (
        parsed_requests.chat,
        parsed_requests.completion,
        parsed_requests.responses,
        parsed_requests.posted,
        parsed_requests.embedding,
    ):
        with suppress(ApiError):
            generate = read(data, 64).generate
            parsed_requests.text_of(generate)
            undeclared(generate, HELLO)
            http_request("m", generate, None)
    parse_body(FeedbackBody, data)


def request_query(data: bytes) -> None:
    parsed_requests.text_of(parsed_requests.queried(data, 64).generate)


class Unconnected(asyncio.Transport):
    """A transport that leads nowhere."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Nothing is sent."""

    def abort(self) -> None:
        """There is nothing to end."""

    def is_closing(self) -> bool:
        return True

    def is_reading(self) -> bool:
        return False


def received(data: bytes, size: int) -> Response:
    """The response of a connection that receives the data in pieces of `size` bytes, and then ends."""
    connection = Connection(HttpClient(SOCKET, None, None), None)
    connection.connection_made(Unconnected())
    response = connection.send(b"")
    for start in range(0, len(data), size):
        connection.data_received(data[start : start + size])
    connection.connection_lost(None)
    return response


def finished[T](running: Coroutine[Any, Any, T]) -> T:
    """The result of what never waits."""
    try:
        running.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise RuntimeError("it waits")


def upstream() -> OpenAiClient:
    return OpenAiClient("m", HttpClient(SOCKET, None, None), Remote(socket=(SOCKET,)), Queue(1, None), b"")


def upstream_events(data: bytes) -> None:
    """The events of a stream, whole and byte by byte."""
    for size in (len(data) + 1, 1):
        client = upstream()
        client.answers[1] = cast(Any, (SimpleNamespace(put=repr), None))
        with suppress(BadAnswer, Lost):
            finished(client.relay(REQUEST, received(HEAD % len(data) + data, size)))


def upstream_answer(data: bytes) -> None:
    """A body that is not streamed: an answer, a list of vectors, a refusal, a list of models, a description."""
    client = upstream()
    for request in (Generate(1, False, 16), Generate(1, False, 0, inputs=["a"])):
        with suppress(BadAnswer, Lost):
            done = finished(client.whole(request, received(HEAD % len(data) + data, 4096)))
            float(done.prompt_tokens + done.completion_tokens)
    client.refusal(REQUEST, 400, data)
    sorted(fields_of(data))
    client.described(data)


def upstream_http(data: bytes) -> None:
    """A whole response, its head included."""
    finished(received(data, 100).whole(1 << 20))


def label_studio(folder: Path, data: bytes) -> None:
    """An export of Label Studio, as each kind of annotation reads it."""
    path = folder / "export.json"
    path.write_bytes(data)
    tasks, _ = read_file(path)
    labels = Labels(
        question="Is it safe?", labels=(Label(name="safe", good=True), Label(name="unsafe", good=False))
    )
    for kind, answers, gives in (
        ("better", ["Left", "Right"], "dpo"),
        ("rating", ["Left"], "kto"),
        ("correction", ["Left"], "sft"),
        ("labels", ["Left"], "kto"),
    ):
        items = [
            Item(f"t{n}", f"task{n}", [{"role": "user", "content": "Where?"}], answers) for n in range(2)
        ]
        exported = Exported(kind, labels, KEY, {each.task: each for each in items}, "")
        judged = Judged(exported, gives, lambda _: False)
        judged.judge(found_in(path, tasks, exported))
        export.lines_of(judged.examples + judged.disagreements).encode()
        json.dumps(judged.rejects)


def feedback_journal(folder: Path, data: bytes) -> None:
    """Lines of ratings, answers and reviews, separated by empty lines: as the gateway and training read them."""
    hour = "20261128T08"
    for kind, part in zip(
        (ratings.RATED, ratings.ANSWERED, ratings.REVIEWED), data.split(b"\n\n"), strict=False
    ):
        (folder / f"{kind}-{hour}.jsonl").write_bytes(part + b"\n")
    lines = data.splitlines(keepends=True)
    ship.answers(folder, ship.ratings_of(lines))
    for line in lines:
        index.described(line)
    list(guard.Tail(folder).new(ratings.RATED, hour))
    for kind in export.KINDS:
        list(export.examples([folder], kind, "", "9999", 100, lambda _: False))
    journal.forget(folder, lambda record: record.get(ratings.SUBJECT) == "alice")


def document_html(data: bytes) -> None:
    "".join(web.pages(data)).encode("utf-8", "ignore")


def document_word(data: bytes) -> None:
    """The main part of a DOCX, and its styles."""
    root = relationships(("rId1", "officeDocument", "word/document.xml"))
    main, _, styles = data.partition(b"\n\n")
    parts: dict[str, str | bytes] = {
        "_rels/.rels": root,
        "word/document.xml": main,
        "word/styles.xml": styles or b"<styles/>",
    }
    "".join(word.pages(archive(parts))).encode("utf-8", "ignore")


CORPUS = Path(__file__).parent / "corpus"
TARGETS = [
    Target(name, parse, tuple(refusals), CORPUS / name)
    for name, parse, *refusals in (
        ("request-body", request_body, ApiError),
        ("request-query", request_query, ApiError),
        ("upstream-events", upstream_events),
        ("upstream-answer", upstream_answer, BadAnswer),
        ("upstream-http", upstream_http, BadAnswer, Lost),
        ("label-studio", in_folder(label_studio), exits.Refusal),
        ("document-html", document_html, Unreadable),
        ("document-word", document_word, Unreadable),
        ("feedback-journal", in_folder(feedback_journal)),
    )
]
