#!/usr/bin/python3
"""key_permissions.py URL NAMESPACE CREDENTIAL [INDEX]: what Elasticsearch permits the key in a sealed credential of this host.

Prints a line for each attempt: the action and the HTTP status. NAMESPACE is the last part of the names of the host's streams.
Where creating is permitted, a document without a timestamp is rejected as invalid (400), so nothing is left behind. With INDEX,
actions that would read its documents, change its mapping or delete it are tried as well: use it only where none may succeed.
"""

import base64
import http.client
import json
import ssl
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

PKI = Path("/etc/llmkeep/pki")
Attempt = tuple[str, str, str, object]


def on(index: str) -> tuple[Attempt, ...]:
    """Attempts to read an index, and to change more than whole documents."""
    return (
        (f"search {index}", "GET", f"/{index}/_search", None),
        (f"get from {index}", "GET", f"/{index}/_doc/1", None),
        (f"update in {index}", "POST", f"/{index}/_update/1?_source=true", {"doc": {}}),
        (f"delete by query in {index}", "POST", f"/{index}/_delete_by_query", {"query": {"match_all": {}}}),
        (f"change the mapping of {index}", "PUT", f"/{index}/_mapping", {"dynamic": True}),
        (f"delete {index}", "DELETE", f"/{index}", None),
    )


def main() -> int:
    where, namespace, credential = urlsplit(sys.argv[1]), sys.argv[2], sys.argv[3]
    own = f"logs-llmkeep.system-{namespace}"  # created by the journal's first entry
    key = subprocess.run(
        ["systemd-creds", "decrypt", f"--name={credential}", f"/etc/credstore.encrypted/{credential}", "-"],
        capture_output=True,
        check=True,
    ).stdout
    context = ssl.create_default_context(cafile=str(PKI / "root.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(PKI / "host.pem", PKI / "host.key")
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"ApiKey {base64.b64encode(key).decode()}",
    }
    for what, method, path, body in (
        *(attempt for index in sys.argv[4:] for attempt in on(index)),
        ("create in its own stream", "POST", f"/{own}/_doc", {}),
        ("create in another stream of its own", "POST", f"/logs-llmkeep.verify-{namespace}/_doc", {}),
        ("create in a stream of another host", "POST", f"/logs-llmkeep.system-not_{namespace}/_doc", {}),
        ("read", "GET", f"/{own}/_search", None),
        ("change", "POST", f"/{own}/_update_by_query", {}),
        ("delete", "DELETE", f"/{own}/_doc/1", None),
        ("delete the stream", "DELETE", f"/_data_stream/{own}", None),
        ("see the cluster", "GET", "/_cluster/health", None),
        ("issue keys", "POST", "/_security/api_key", {"name": "verify", "role_descriptors": {}}),
        ("see snapshots", "GET", "/_snapshot/llmkeep/_all", None),
        ("delete snapshots", "DELETE", "/_snapshot/llmkeep/none", None),
        ("restore", "POST", "/_snapshot/llmkeep/none/_restore", {}),
        ("drop the repository", "DELETE", "/_snapshot/llmkeep", None),
    ):
        link = http.client.HTTPSConnection(
            where.hostname or "", where.port or 443, timeout=10, context=context
        )
        link.request(method, path, None if body is None else json.dumps(body), headers)
        print(f"{what}: {link.getresponse().status}")
        link.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
