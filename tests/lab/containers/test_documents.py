"""Two tenants' documents on the estate: added by root of the serving host, searched and cited through the edge."""

import base64
import http.client
import json
import runpy
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from browsing import ask, signed_in
from estate import ROOT, WITH_LOGS, Client, Lab, elasticsearch, open_client, request, within

SOURCE = "/etc/llmkeep/policy/source"
COLLECTIONS = """
handbook: {tenant: research, readers: [developer], writers: [developer]}
plans: {tenant: sales, readers: [developer]}
"""
MARKERS = {"handbook": "heron-7461", "plans": "crane-9953"}
TENANTS = {"handbook": "research", "plans": "sales"}
RULE = "Travel is booked a week ahead, by the form with the number {}."
MODEL = "smollm2-135m-instruct"
ALIASES = "handbook-assistant: {model: quoting, collections: [handbook]}"
HELPERS = ROOT / "payload/tests/helpers"
FILES = runpy.run_path(str(HELPERS / "document_files.py"))
BINARY = {
    "manual.pdf": FILES["pdf"](FILES["drawn"]("The first page."), FILES["drawn"]("The plover-31 runs.")),
    "letter.docx": FILES["docx"](FILES["paragraph"]("The dunlin-52 waits.")),
}
QUOTING = {
    "name": "quoting",
    "driver": "remote",
    "remote": {"socket": ["/run/quoting/api.sock"], "revision": "1", "fields": ["structured_outputs"]},
}
SERVE = """
import threading
from pathlib import Path
from scripted_upstream import QuotingUpstream, answer
server = QuotingUpstream(Path("/run/quoting/api.sock"))
server.models = answer({"object": "list", "data": [{"id": "quoting", "max_model_len": 4096}]})
threading.Event().wait()
"""


def add(lab: Lab, collection: str, text: str) -> str:
    """Add a document as root of llm1; what the command prints."""
    options = f"--collection {collection} --tenant {TENANTS[collection]}"
    command = f"cat > /run/rules.md && llm-serve documents add {options} /run/rules.md"
    return lab.on("llm1", command, given=text)


@pytest.fixture(scope="module")
def client(logged: Lab) -> Client:
    """With a collection of each of two tenants, and a document with a marker in each."""
    logged.on("ops1", f"cp -r /opt/llmkeep/tree/policy {SOURCE}")
    for folder, data in {"collections": COLLECTIONS, "aliases": ALIASES}.items():
        logged.on("ops1", f"cat > {SOURCE}/llm/{folder}/data.yaml", given=data)
    logged.on("ops1", "llmkeep policy build")
    logged.on("ops1", f"llmkeep site {WITH_LOGS} --tags opa", timeout=300)
    for collection, marker in MARKERS.items():
        assert "added  1 passages  rules.md" in add(logged, collection, RULE.format(marker))
    return open_client(logged)


@pytest.fixture(scope="module")
def keys(logged: Lab) -> dict[str, str]:
    """A developer's key by collection of the tenant."""
    made = "llm-serve keys add --subject eve@lab --role developer --tenant"
    return {
        collection: logged.on("llm1", f"{made} {tenant}").strip() for collection, tenant in TENANTS.items()
    }


def test_each_tenant_finds_its_own_documents_through_the_edge(client: Client, keys: dict[str, str]) -> None:
    for collection, key in keys.items():
        body = {"query": "When is travel booked?", "collections": [collection]}
        status, answer = request(client, "POST", "/v1/search", body, key)
        assert status == 200, answer
        assert [each["text"] for each in json.loads(answer)["data"]] == [RULE.format(MARKERS[collection])]
        for other in TENANTS.keys() - {collection}:
            status, answer = request(client, "POST", "/v1/search", body | {"collections": [other]}, key)
            assert (status, json.loads(answer)["error"]["code"]) == (404, "collection_not_found")


def test_a_model_answers_from_the_callers_documents_and_cites_them(
    client: Client, keys: dict[str, str]
) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "When is travel booked, and by which form?"}],
        "collections": ["handbook"],
        "max_tokens": 64,
        "temperature": 0,
    }
    status, answer = request(client, "POST", "/v1/chat/completions", body, keys["handbook"])
    assert status == 200, answer
    assert MARKERS["plans"] not in answer.decode()
    assert {each["collection"] for each in json.loads(answer)["documents"]["citations"]} <= {"handbook"}
    status, answer = request(client, "POST", "/v1/chat/completions", body, keys["plans"])
    assert (status, json.loads(answer)["error"]["code"]) == (404, "collection_not_found")


def test_a_removed_document_is_found_no_more_and_its_removal_is_on_record(
    logged: Lab, client: Client, keys: dict[str, str]
) -> None:
    collection = "--collection handbook --tenant research"
    document = logged.on("llm1", f"llm-serve documents list {collection}").split()[0]
    logged.on("llm1", f"llm-serve documents remove {collection} {document}")
    body = {"query": MARKERS["handbook"], "collections": ["handbook"]}
    status, answer = request(client, "POST", "/v1/search", body, keys["handbook"])
    assert (status, json.loads(answer)["data"]) == (200, [])
    assert document in logged.on(
        "llm1", "grep --no-filename document.removed /var/log/llm-audit/records-*.jsonl"
    )
    assert "added" in add(logged, "handbook", RULE.format(MARKERS["handbook"]))


def test_a_pdf_and_a_docx_are_read_by_a_process_that_can_open_nothing(
    logged: Lab, client: Client, keys: dict[str, str]
) -> None:
    options = "--collection handbook --tenant research"
    for name, content in BINARY.items():
        command = f"base64 --decode > /run/{name} && llm-serve documents add {options} /run/{name} && rm /run/{name}"
        assert "added" in logged.on("llm1", command, given=base64.b64encode(content).decode())
    for query, name, page in (("plover-31", "manual.pdf", 2), ("dunlin-52", "letter.docx", 1)):
        body = {"query": query, "collections": ["handbook"], "size": 50}
        status, answer = request(client, "POST", "/v1/search", body, keys["handbook"])
        assert status == 200, answer
        [passage] = [each for each in json.loads(answer)["data"] if query in each["text"]]
        assert (passage["name"], passage["page"]) == (name, page)


def test_the_documents_of_an_index_for_another_model_are_carried_to_a_new_one(
    logged: Lab, client: Client, keys: dict[str, str]
) -> None:
    """By the host's own key. The old index is a copy that has another name."""
    status = "llm-serve documents status --json --collection plans --tenant sales"
    before = json.loads(logged.on("llm1", status))
    assert before["bytes"] > 0
    unblocked = {"settings": {"index.blocks.write": None}}
    elasticsearch(logged, "PUT", f"/{before['index']}/_block/write")
    elasticsearch(logged, "POST", f"/{before['index']}/_clone/llmkeep-documents-old", unblocked)
    actions = [
        {"add": {"index": "llmkeep-documents-old", "alias": "llmkeep-documents"}},
        {"remove_index": {"index": before["index"]}},
    ]
    elasticsearch(logged, "POST", "/_aliases", {"actions": actions})
    elasticsearch(logged, "GET", "/llmkeep-documents/_count")
    output = logged.on("llm1", "llm-serve documents reindex")
    assert f"{before['index']} replaces llmkeep-documents-old" in output
    after = json.loads(logged.on("llm1", status))
    assert after | {"bytes": 0} == before | {"bytes": 0}
    assert "has the vectors of" in logged.on("llm1", "llm-serve documents reindex")
    for collection, key in keys.items():
        body = {"query": "When is travel booked?", "collections": [collection]}
        _, answer = request(client, "POST", "/v1/search", body, key)
        assert MARKERS[collection] in answer.decode()


def upload(client: Client, key: str, name: str, content: bytes) -> tuple[int, str]:
    """Add a document to the handbook through the edge; the status, and how it ended."""
    target = urlsplit(client.url)
    context = ssl.create_default_context(cafile=str(client.ca))
    link = http.client.HTTPSConnection(str(target.hostname), target.port, context=context, timeout=120)
    try:
        path = f"/v1/collections/handbook/documents?name={name}"
        link.request("POST", path, content, {"authorization": f"Bearer {key}"})
        answer = link.getresponse()
        said = json.loads(answer.read())
    finally:
        link.close()
    return answer.status, said.get("status") or said["error"]["code"]


def test_what_a_writer_uploads_through_the_edge_is_found_by_its_tenant_alone(
    logged: Lab, client: Client, keys: dict[str, str]
) -> None:
    """Files of more than other requests may have, which the unit's own user reads and writes with its own key."""
    page = f"<p>The upload of the bittern-58 is known.</p><!--{'x' * (3 << 20)}-->".encode()
    manual = FILES["pdf"](FILES["drawn"]("A page."), FILES["drawn"]("The whimbrel-64 is uploaded."))
    for name, content in (("upload.html", page), ("upload.pdf", manual)):
        assert upload(client, keys["plans"], name, content) == (404, "collection_not_found")
        status, outcome = upload(client, keys["handbook"], name, content)
        assert (status, outcome) in {(201, "added"), (202, "accepted")}

    def rows() -> dict[str, Any]:
        status, answer = request(client, "GET", "/v1/collections/handbook/documents", key=keys["handbook"])
        assert status == 200, answer
        return {each["name"]: each for each in json.loads(answer)["data"]}

    within(
        60,
        "both are ready",
        lambda: {rows()[f"upload.{end}"]["status"] for end in ("html", "pdf")} == {"ready"},
    )
    for query, name, number in (("bittern-58", "upload.html", 1), ("whimbrel-64", "upload.pdf", 2)):
        body = {"query": query, "collections": ["handbook"], "size": 50}
        _, answer = request(client, "POST", "/v1/search", body, keys["handbook"])
        [passage] = [each for each in json.loads(answer)["data"] if query in each["text"]]
        assert (passage["name"], passage["page"]) == (name, number)
        for collection in TENANTS:
            _, answer = request(
                client, "POST", "/v1/search", body | {"collections": [collection]}, keys["plans"]
            )
            assert query not in answer.decode()
    document = rows()["upload.pdf"]["id"]
    path = f"/v1/collections/handbook/documents?document={document}"
    assert request(client, "DELETE", path, key=keys["plans"])[0] == 404
    assert request(client, "DELETE", path, key=keys["handbook"])[0] == 204
    assert "upload.pdf" not in rows()
    record = logged.on("llm1", f"grep --no-filename {document} /var/log/llm-audit/records-*.jsonl")
    events = [json.loads(line) for line in record.splitlines()]
    by_user = {
        (each["event.action"], each["user.id"]) for each in events if "document." in each["event.action"]
    }
    assert by_user == {("document.added", "eve@lab"), ("document.removed", "eve@lab")}


@pytest.fixture(scope="module")
def quoting(logged: Lab) -> Iterator[None]:
    """On llm1 a stand-in for a model that cites, which none of the lab does: the model `quoting` quotes the best passage."""
    logged.send("llm1", "/opt/quoting", {"scripted_upstream.py": HELPERS / "scripted_upstream.py"})
    logged.on("llm1", "cat > /opt/quoting/serve.py", given=SERVE)
    properties = "--property=User=nobody --property=RuntimeDirectory=quoting --property=UMask=0"
    logged.on("llm1", f"systemd-run --unit=quoting {properties} python3.13 /opt/quoting/serve.py")
    hosts = yaml.safe_load((ROOT / "inventory/lab/hosts.yml").read_text())["all"]["children"]["serve"]
    models = [*hosts["vars"]["llm_serving_models"], QUOTING]
    inventory = {"all": {"children": {"serve": {"vars": {"llm_serving_models": models}}}}}
    logged.on("ops1", "mkdir /root/quoting && cat > /root/quoting/hosts.yml", given=json.dumps(inventory))
    logged.on("ops1", f"llmkeep site {WITH_LOGS} -i /root/quoting --tags llm_serving", timeout=600)
    yield
    logged.on("llm1", "systemctl stop quoting")


@pytest.mark.usefixtures("quoting")
@pytest.mark.parametrize(
    ("language", "name", "content", "question", "sentence", "source"),
    [
        (
            "en",
            "meals.pdf",
            FILES["pdf"](FILES["drawn"]("The first page."), FILES["drawn"]("Meals are paid by receipt.")),
            "How are meals paid?",
            "Meals are paid by receipt.",
            "meals.pdf, page 2",
        ),
        (
            "zh",
            "差旅规定.docx",
            FILES["docx"](FILES["paragraph"]("出差须提前一周预订。")),
            "出差要提前多久预订？",
            "出差须提前一周预订。",
            "差旅规定.docx，第 1 页",
        ),
    ],
    ids=["in English", "in Chinese"],
)
def test_a_person_adds_a_document_on_the_page_and_an_answer_shows_its_page_and_passage(
    client: Client,
    keys: dict[str, str],
    chromium: Any,
    language: str,
    name: str,
    content: bytes,
    question: str,
    sentence: str,
    source: str,
) -> None:
    with signed_in(chromium, client, "/", keys["handbook"], language) as person:
        person.locator("#documents summary").click()
        person.locator("#add-documents").set_input_files([{"name": name, "mimeType": "", "buffer": content}])
        # It is listed before it can be found, and can be removed only afterwards.
        person.locator("#documents li", has_text=name).get_by_role("button").wait_for()
        person.locator("#model option[value='handbook-assistant']").wait_for(state="attached")
        person.locator("#model").select_option("handbook-assistant")
        answer, _ = ask(person, question)
        [summary] = answer.locator(".source summary").all_inner_texts()
        assert summary.endswith(source)
        assert sentence in str(answer.locator(".source p").text_content())
        assert answer.locator(".unsupported").count() == 0


@pytest.mark.usefixtures("client")
def test_no_text_of_a_document_is_in_a_log(logged: Lab) -> None:
    for host in ("ops1", "llm1"):
        assert not logged.on(
            host,
            f"journalctl --output=cat | grep -E '{'|'.join([*MARKERS.values(), 'bittern-58', 'whimbrel-64'])}' || true",
        ).strip()
