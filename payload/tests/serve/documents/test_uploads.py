"""Documents that callers upload: a gateway, the unit that takes them in, and a real Elasticsearch, for two tenants."""

import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from document_files import drawn, pdf
from edge import in_front_of
from search_server import SearchServer, search_server
from service import Service, eventually, running
from uploads import LIMIT, instead, intake, searching, taking_in

from llmserve.documents.intake_protocol import name_fault

pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
MARKER = "avocet-3190"


@pytest.fixture(scope="module")
def index() -> Iterator[SearchServer]:
    with search_server() as server:
        yield server


@pytest.fixture(scope="module")
def service(index: SearchServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("uploads")
    with (
        running(folder, **searching(folder, index)) as service,
        taking_in(service, BODY_SECONDS=5.0),
    ):
        yield service


@pytest.fixture(scope="module")
def theirs(service: Service) -> str:
    """A key of the other tenant."""
    return str(service.add_key("eve", "sales")["key"])


def upload(
    service: Service, name: str, content: bytes, collection: str = "handbook", key: str | None = None
) -> Any:
    with service.client(key) as client:
        return client.post(f"/v1/collections/{collection}/documents", params={"name": name}, content=content)


def listed(service: Service, collection: str = "handbook", key: str | None = None) -> dict[str, Any]:
    with service.client(key) as client:
        answer = client.get(f"/v1/collections/{collection}/documents")
    assert answer.status_code == 200, answer.text
    return {each["name"]: each for each in answer.json()["data"]}


def test_an_uploaded_document_is_found_and_its_writer_is_on_record_and_in_lists(service: Service) -> None:
    answer = upload(service, "travel rules.md", f"Travel needs the form {MARKER}.".encode())
    assert (answer.status_code, answer.json()["status"]) == (201, "added"), answer.text
    row = listed(service)["travel rules.md"]
    assert (row["status"], row["by"], row["passages"]) == ("ready", "ada", 1)
    with service.client() as client:
        body = {"query": "travel", "collections": ["handbook"], "size": 50}
        assert MARKER in client.post("/v1/search", json=body).text
    [event] = [
        each
        for each in service.records()
        if each["event.action"] == "document.added" and each["llmkeep.documents.document"] == row["id"]
    ]
    assert (event["user.id"], event["organization.id"]) == ("ada", "research")
    assert (event["llmkeep.documents.collection"], event["llmkeep.documents.revision"]) == (
        "handbook",
        row["revision"],
    )
    requests = [each for each in service.records() if each.get("transaction.id") == event["transaction.id"]]
    assert {"POST /v1/collections/*", "document.added"} == {each["event.action"] for each in requests}
    where = ["--collection", "handbook", "--tenant", "research"]
    config = ["--config", str(service.folder / "gateway.yaml")]
    assert "travel rules.md  by ada" in service.cli("documents", "list", *where, *config).stdout
    written = service.logs() + json.dumps(service.records())
    assert MARKER not in written
    assert "travel rules" not in written


def test_a_document_is_unchanged_replaced_and_removed(service: Service) -> None:
    assert upload(service, "birds.txt", b"The first.").json()["status"] == "added"
    again = upload(service, "birds.txt", b"The first.")
    assert (again.status_code, again.json()["status"]) == (200, "unchanged")
    assert upload(service, "birds.txt", b"The second.").json()["status"] == "replaced"
    document = listed(service)["birds.txt"]["id"]
    with service.client() as client:
        path = f"/v1/collections/handbook/documents?document={document}"
        assert client.delete(path).status_code == 204
        gone = client.delete(path)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "document_not_found")
    assert "birds.txt" not in listed(service)
    [event] = [
        each
        for each in service.records()
        if each["event.action"] == "document.removed" and each["llmkeep.documents.document"] == document
    ]
    assert event["user.id"] == "ada"


def test_a_pdf_is_read_by_the_confined_parser(service: Service) -> None:
    answer = upload(service, "manual.pdf", pdf(drawn("The first page."), drawn("The plover-31 runs.")))
    assert (answer.json()["status"], answer.json()["passages"]) == ("added", 2)


def test_a_writer_of_one_tenant_reaches_no_collection_of_another(service: Service, theirs: str) -> None:
    assert upload(service, "plan.md", b"Their plan.", "plans", theirs).status_code == 201
    document = listed(service, "plans", theirs)["plan.md"]["id"]
    missing = upload(service, "a.md", b"x", "nothing")
    for key, collection in ((None, "plans"), (theirs, "handbook"), (None, "salaries")):
        answer = upload(service, "a.md", b"x", collection, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "collection_not_found")
        if key is None:
            assert answer.text == missing.text.replace("nothing", collection)
        with service.client(key) as client:
            assert client.get(f"/v1/collections/{collection}/documents").status_code == 404
            assert (
                client.delete(f"/v1/collections/{collection}/documents?document={document}").status_code
                == 404
            )
    with service.client() as client:
        own = client.delete(f"/v1/collections/handbook/documents?document={document}")
    assert (own.status_code, own.json()["error"]["code"]) == (404, "document_not_found")
    assert "plan.md" in listed(service, "plans", theirs)


def test_a_reader_that_is_no_writer_is_refused_and_sees_what_it_may(service: Service) -> None:
    answer = upload(service, "a.md", b"x", "rules")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "denied")
    with service.client() as client:
        assert client.get("/v1/collections/rules/documents").status_code == 403
        own = client.get("/v1/collections").json()
    assert own["data"] == [
        {"id": "handbook", "read": True, "write": True},
        {"id": "rules", "read": True, "write": False},
    ]
    assert (own["uploads"], own["upload_bytes"]) == (True, LIMIT)


def bomb() -> bytes:
    """An Office file that unpacks to more than a document may."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            with archive.open(f"part{number}", "w", force_zip64=True) as part:
                for _ in range(100):
                    part.write(bytes(1 << 20))
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.docx", b"PK", "broken.docx is broken"),
        ("latin.txt", "Übergröße".encode("latin-1"), "is not UTF-8"),
        ("empty.md", b" \n", "has no visible text"),
        ("tool.exe", b"MZ", "has the unsupported format '.exe'"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(
    service: Service, name: str, content: bytes, reason: str
) -> None:
    answer = upload(service, name, content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unreadable_document")
    assert reason in answer.json()["error"]["message"]


def test_a_failure_is_listed_until_it_is_removed_and_a_bomb_is_one(service: Service) -> None:
    answer = upload(service, "bomb.docx", bomb())
    assert answer.status_code == 422, answer.text
    assert "exceeds the size limit when unpacked" in answer.json()["error"]["message"]
    row = listed(service)["bomb.docx"]
    assert (row["status"], row["by"]) == ("failed", "ada")
    with service.client() as client:
        assert client.delete(f"/v1/collections/handbook/documents?document={row['id']}").status_code == 204
    assert "bomb.docx" not in listed(service)


@pytest.mark.parametrize(
    "name", ["", "../rules.md", "a/b.md", "a\\b.md", "a\nb.md", "a\u202eb.md", "x" * 256]
)
def test_a_name_that_is_none_is_refused(service: Service, name: str) -> None:
    answer = upload(service, name, b"A rule.")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


def test_a_file_that_is_too_large_or_of_unknown_size_is_refused(service: Service) -> None:
    large = upload(service, "large.md", b"x" * (LIMIT + 1))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    with service.client() as client:
        chunked = client.post(
            "/v1/collections/handbook/documents", params={"name": "a.md"}, content=iter([b"x"])
        )
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (411, "length_required")


def test_the_edge_passes_an_upload_on_as_it_comes_and_refuses_one_over_its_limit(
    service: Service, tmp_path: Path
) -> None:
    """More than other bodies may have; nothing of it is on the edge's disk."""
    limits = {"edge_body_bytes": 1000, "edge_upload_bytes": 2 * LIMIT, "__edge_uploads": True}
    path = "/v1/collections/handbook/documents?name=large.html"
    with (
        in_front_of(service.folder / "http.sock", tmp_path / "nginx", **limits) as edge,
        edge.client(authorization=f"Bearer {service.key}") as client,
    ):
        page = b"<p>A rule.</p><!--" + b"x" * (LIMIT // 2) + b"-->"
        added = client.post(path, content=page)
        assert added.status_code == 201, added.text
        refused = client.post(path, content=b"x" * (2 * LIMIT + 1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        assert f"larger than {2 * LIMIT} bytes" in refused.json()["error"]["message"]
        elsewhere = client.post("/v1/search", content=b"x" * 1001)
        assert "larger than 1000 bytes" in elsewhere.json()["error"]["message"]
        assert client.get("/v1/collections").json()["uploads"] is True
        begun = edge.folder / "access.log"
        assert '"path":"/v1/collections/handbook/documents"' in begun.read_text()
        assert "large.html" not in begun.read_text()
        assert not list((edge.folder / "t1").rglob("*"))


@pytest.mark.parametrize(
    ("size", "collection", "headers", "refusal"),
    [
        (LIMIT + 1, "handbook", {}, (413, "body_too_large")),
        (LIMIT, "nothing", {}, (404, "collection_not_found")),
        (LIMIT, "handbook", {"authorization": ""}, (401, "missing_key")),
    ],
    ids=["too large", "no such collection", "a stranger's"],
)
def test_a_large_file_that_is_refused_gets_the_refusal_and_its_connection_takes_more(
    service: Service,
    tmp_path: Path,
    size: int,
    collection: str,
    headers: dict[str, str],
    refusal: tuple[int, str],
) -> None:
    """Through the edge, which passes the body on while the gateway refuses it."""
    limits = {"edge_upload_bytes": 2 * LIMIT, "__edge_uploads": True}
    path = f"/v1/collections/{collection}/documents?name=large.md"
    with (
        in_front_of(service.folder / "http.sock", tmp_path / "nginx", **limits) as edge,
        edge.client(authorization=f"Bearer {service.key}") as client,
    ):
        for _ in range(5):
            answer = client.post(path, content=b"x" * size, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == refusal


def test_a_refusal_waits_for_the_body_that_is_on_its_way(service: Service) -> None:
    with half_sent(service, "no-key", "handbook", 0) as link:
        assert not select.select([link], [], [], 0.5)[0]
        link.sendall(b"e")
        assert b" 401 " in link.recv(200)


def half_sent(service: Service, key: str, collection: str, number: int) -> socket.socket:
    """A connection that has sent a file but for its last byte."""
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(20)
    link.connect(str(service.folder / "http.sock"))
    path = f"/v1/collections/{collection}/documents?name=half{number}.md"
    link.sendall(
        f"POST {path} HTTP/1.1\r\nhost: llm\r\nauthorization: Bearer {key}\r\ncontent-length: 6\r\n\r\nA rul".encode()
    )
    return link


def test_without_a_place_a_file_is_refused_for_now_and_other_tenants_have_theirs(
    service: Service, theirs: str
) -> None:
    """A file that does not arrive gives its place back."""
    with ExitStack() as stack:
        links = [stack.enter_context(half_sent(service, service.key, "handbook", each)) for each in (1, 2)]
        busy = eventually(
            "both places are taken",
            lambda: (answer := upload(service, "third.md", b"x")).status_code == 503 and answer,
        )
        assert busy.json()["error"]["code"] == "documents_busy"
        assert int(busy.headers["retry-after"]) > 0
        assert upload(service, "other.md", b"Their rule.", "plans", theirs).status_code == 201
        for link in links:
            assert b" 503 " in link.recv(200)
    assert upload(service, "fourth.md", b"A rule.").status_code == 201
    assert not [name for name in listed(service) if name.startswith("half")]


def test_documents_that_come_together_are_all_added(service: Service) -> None:
    def persistent(number: int) -> int:
        answer = eventually(
            "there is a place",
            lambda: (
                (answer := upload(service, f"many{number}.md", b"Rule %d." % number)).status_code != 503
                and answer
            ),
        )
        return int(answer.status_code)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(persistent, range(4))) == {201}


def test_while_the_unit_is_away_a_sentence_says_so_and_it_comes_back(service: Service) -> None:
    socket_path = Path(str((service.documents or {})["intake"]))
    aside = socket_path.with_suffix(".aside")
    socket_path.rename(aside)
    try:
        answer = upload(service, "a.md", b"A rule.")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "documents_unavailable")
        assert "cannot be added, listed or removed now: retry later" in answer.json()["error"]["message"]
    finally:
        aside.rename(socket_path)
    assert upload(service, "a.md", b"A rule.").status_code == 201


def hold_engine(service: Service, stack: ExitStack) -> Callable[[], None]:
    """No text is embedded until the returned function is called, or the stack ends."""
    process = service.engines["tiny"].process

    def go_on() -> None:
        process.send_signal(signal.SIGCONT)

    process.send_signal(signal.SIGSTOP)
    stack.callback(go_on)
    return go_on


def test_a_file_that_takes_long_is_accepted_listed_as_waiting_and_then_as_ready(service: Service) -> None:
    with instead(service, 2, {}, WAIT_SECONDS=0.5), ExitStack() as stack:
        go_on = hold_engine(service, stack)
        accepted = upload(service, "slow.md", b"A slow rule.")
        assert (accepted.status_code, accepted.json()["status"]) == (202, "accepted")
        assert listed(service)["slow.md"]["status"] == "waiting"
        go_on()
        row = eventually(
            "it is ready", lambda: (row := listed(service)["slow.md"])["status"] == "ready" and row
        )
    assert (row["by"], row["passages"]) == ("ada", 1)


@pytest.mark.parametrize(("seconds", "left"), [(30.0, True), (0.5, False)])
def test_a_unit_that_is_stopped_ends_the_file_that_it_reads_within_its_time(
    service: Service, seconds: float, left: bool
) -> None:
    name = f"stopped-{seconds:g}.md"
    number = 3 + left
    with ExitStack() as stack:
        process = stack.enter_context(instead(service, number, {}, WAIT_SECONDS=0.5, STOP_SECONDS=seconds))
        stack.enter_context(half_sent(service, service.key, "handbook", number))
        go_on = hold_engine(service, stack)
        assert upload(service, name, b"A rule that is read.").status_code == 202
        process.process.terminate()
        eventually("it stops", lambda: upload(service, "late.md", b"A rule.").status_code == 503)
        if left:
            go_on()
        assert process.ended() == 0
        assert ("stopped before documents were added" in process.log.read_text()) != left
    assert (name in listed(service)) == left


@pytest.mark.parametrize(
    ("number", "changes", "reason"),
    [
        (
            5,
            {"audit": {"socket": "/nonexistent/audit.sock"}},
            "try again later; operators find the reason",
        ),
        (6, {"engine": "/nonexistent/tiny.sock"}, "start the engine for embeddings"),
        (7, {"documents": {"url": "http://127.0.0.1:9"}}, "the index cannot be reached, or refuses"),
        (
            8,
            {"documents": {"index": "llmkeep-none"}},
            "there is no index of documents yet: ask an operator to restart",
        ),
    ],
    ids=["without the record", "without the engine", "without Elasticsearch", "without the index"],
)
def test_without_what_the_unit_needs_nothing_is_added_and_a_sentence_says_so(
    service: Service, number: int, changes: dict[str, dict[str, str] | str], reason: str
) -> None:
    if isinstance(documents := changes.get("documents"), dict):
        changes = {"documents": {**(service.documents or {}), **documents}}
    name = f"lacking-{number}.md"
    document = upload(service, "kept.md", b"A rule that is there.").json()["id"]
    with instead(service, number, changes), service.client() as client:
        answer = upload(service, name, b"A rule.")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "documents_unavailable")
        assert reason in answer.json()["error"]["message"]
        if "audit" in changes:
            path = f"/v1/collections/handbook/documents?document={document}"
            assert client.delete(path).status_code == 503
    assert name not in listed(service)
    assert "kept.md" in listed(service)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's process is started by root alone")
def test_a_process_of_another_user_is_not_heard(service: Service, tmp_path: Path) -> None:
    """Although the file system lets it connect."""
    other = Path(f"/tmp/llmkeep-{os.getpid()}.sock")  # its folder is open to all
    process = intake(service, 1, socket=str(other))
    try:
        other.chmod(0o666)
        order = {"verb": "list", "tenant": "research", "collection": "handbook", "subject": "ada"}
        order |= {"transaction": "1", "decision": "1"}
        ask = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
            "s.sendall(sys.argv[2].encode() + b'\\n'); print(s.makefile().read())"
        )
        # Another user may not reach the environment's folder.
        python = str(Path(sys.executable).resolve())
        command = [python, "-I", "-S", "-c", ask, str(other), json.dumps(order)]
        allowed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert '"listed"' in allowed.stdout
        refused = subprocess.run(command, capture_output=True, text=True, check=False, user="daemon")
        assert '"listed"' not in refused.stdout
        assert "a process other than a gateway has connected" in process.log.read_text()
    finally:
        process.stop()
        other.unlink(missing_ok=True)


def test_a_name_in_chinese_is_a_name() -> None:
    assert name_fault("差旅规定.docx") == ""
