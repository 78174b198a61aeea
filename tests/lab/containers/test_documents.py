"""Two tenants' documents on the estate: added by root of the serving host, searched and cited through the edge."""

import json

import pytest
from estate import WITH_LOGS, Client, Lab, open_client, request

SOURCE = "/etc/llmkeep/policy/source"
COLLECTIONS = """
handbook: {tenant: research, readers: [developer]}
plans: {tenant: sales, readers: [developer]}
"""
MARKERS = {"handbook": "heron-7461", "plans": "crane-9953"}
TENANTS = {"handbook": "research", "plans": "sales"}
RULE = "Travel is booked a week ahead, by the form with the number {}."
MODEL = "smollm2-135m-instruct"


def add(lab: Lab, collection: str, text: str) -> str:
    """Add a document as root of llm1; what the command prints."""
    options = f"--collection {collection} --tenant {TENANTS[collection]}"
    command = f"cat > /run/rules.md && llm-serve documents add {options} /run/rules.md"
    return lab.on("llm1", command, given=text)


@pytest.fixture(scope="module")
def client(logged: Lab) -> Client:
    """With a collection of each of two tenants, and a document with a marker in each."""
    policy = f"cp -r /opt/llmkeep/tree/policy {SOURCE} && cat > {SOURCE}/llm/collections/data.yaml && llmkeep policy build"
    logged.on("ops1", policy, given=COLLECTIONS)
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


@pytest.mark.usefixtures("client")
def test_no_text_of_a_document_is_in_a_log(logged: Lab) -> None:
    for host in ("ops1", "llm1"):
        assert not logged.on(
            host, f"journalctl --output=cat | grep -E '{'|'.join(MARKERS.values())}' || true"
        ).strip()
