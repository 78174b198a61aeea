#!/usr/bin/python3
"""served-certificate ADDRESS PORT NAME [FILE [ROOT]]: is the certificate served there the one on disk?

Uses TLS 1.3, trusts only the estate's root, or ROOT, and asks for NAME. Exit 0: equal. Exit 1: prints the difference.
A reload takes a moment, so the comparison is retried for five seconds.
"""

import hashlib
import socket
import ssl
import sys
import time
from pathlib import Path

PATIENCE_SECONDS = 5
ESTATE = "/etc/llmkeep/pki/root.pem"


def on_disk(path: str) -> str:
    first = (
        Path(path).read_text("ascii").split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"
    )
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first.lstrip())).hexdigest()


def served(address: str, port: int, name: str, root: str) -> str:
    context = ssl.create_default_context(cafile=root)
    if root != ESTATE:
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # other CAs' certificates do not satisfy it
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with (
        socket.create_connection((address, port), timeout=3) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        return hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()


def main() -> int:
    if len(sys.argv) not in (4, 5, 6):
        print(__doc__, file=sys.stderr)
        return 2
    address, port, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    path = sys.argv[4] if len(sys.argv) > 4 else "/etc/llmkeep/pki/host.pem"
    root = sys.argv[5] if len(sys.argv) > 5 else ESTATE
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            certificate = served(address, port, name, root)
        except OSError as problem:
            certificate = f"{type(problem).__name__}: {problem}"
        expected = on_disk(path)
        if certificate == expected:
            print(f"served: {certificate}")
            return 0
        if time.monotonic() > end:
            print(f"served by {address}:{port}: {certificate}; on disk in {path}: {expected}")
            return 1
        time.sleep(0.25)


if __name__ == "__main__":
    sys.exit(main())
