#!/usr/bin/python3
"""served-file URL FILE|STATUS [METHOD [CERTIFICATE KEY]]: does the mirror answer with this file's bytes, or with this status?

TLS 1.3, the estate's root only; without a client certificate unless one is named. Exit 0: yes. Exit 1: prints the answer.
"""

import hashlib
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path


def answer(url: str, method: str = "GET", *identity: str) -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if identity:
        context.load_cert_chain(*identity)
    request = urllib.request.Request(url, method=method)  # noqa: S310 -- https alone: main()
    try:
        with urllib.request.urlopen(request, context=context, timeout=5) as reply:  # noqa: S310
            return reply.status, reply.read()
    except urllib.error.HTTPError as refusal:
        return refusal.code, b""


def main() -> int:
    if len(sys.argv) not in (3, 4, 6) or not sys.argv[1].startswith("https://"):
        print(__doc__, file=sys.stderr)
        return 2
    url, expected = sys.argv[1], sys.argv[2]
    status, body = answer(url, *sys.argv[3:])
    digest = hashlib.sha256(body).hexdigest()
    print(f"{url}: status {status}, {len(body)} bytes, sha256 {digest}")
    if expected.isdigit():
        return int(status != int(expected))
    same = hashlib.sha256(Path(expected).read_bytes()).hexdigest() == digest
    return int(status != 200 or not same)


if __name__ == "__main__":
    sys.exit(main())
