#!/usr/bin/python3
"""document_permissions.py URL CREDENTIAL: what Elasticsearch permits the key in a sealed credential of this host.

Prints a line for each attempt: the action and the HTTP status. Nothing is changed: where writing is permitted, a document with
an unmapped field is rejected as invalid (400), and neither the deleted document nor the index named with `none` exists. The
index of documents need not exist.
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
INDEX = "llmkeep-documents"
ABSENT = "?ignore_unavailable=true&allow_no_indices=true"
NONE = {"query": {"ids": {"values": ["none"]}}}


def main() -> int:
    where, credential = urlsplit(sys.argv[1]), sys.argv[2]
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
    for attempt, method, path, body in (
        ("search documents", "POST", f"/{INDEX}/_search{ABSENT}", NONE),
        ("write a document", "PUT", f"/{INDEX}/_doc/none?require_alias=true", {"unknown": 1}),
        ("delete a document", "DELETE", f"/{INDEX}/_doc/none", None),
        ("delete the index", "DELETE", f"/{INDEX}-none", None),
        ("measure the index", "GET", f"/{INDEX}-none/_stats/store", None),
        ("refuse writes to the index", "PUT", f"/{INDEX}-none/_block/write", None),
        ("take writes to the index", "PUT", f"/{INDEX}-none/_settings", {"index.blocks.write": None}),
        ("add a field to the index", "PUT", f"/{INDEX}-none/_mapping", {"properties": {}}),
        ("search logs", "GET", "/logs-llmkeep.service-none/_search", None),
        ("see the cluster", "GET", "/_cluster/health", None),
        ("issue keys", "POST", "/_security/api_key", {"name": "verify", "role_descriptors": {}}),
    ):
        link = http.client.HTTPSConnection(
            where.hostname or "", where.port or 443, timeout=10, context=context
        )
        link.request(method, path, None if body is None else json.dumps(body), headers)
        status = link.getresponse().status
        # Without the alias the document is refused as well: the index does not exist, and writing must not create one.
        print(f"{attempt}: {400 if status == 404 and attempt == 'write a document' else status}")
        link.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
