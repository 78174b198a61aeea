#!/usr/bin/python3
"""Verify the signatures of kernel modules without loading one: module_signature.py CERTIFICATE.der MODULE...

A signed module ends with a detached PKCS#7 message, twelve bytes that say how long it is, and a magic line
(struct module_signature in the kernel's include/linux/module_signature.h). The message must verify by exactly this
certificate, by any issuer. Prints each fault; exits with 1 if there is one, or no module.

Standard library and openssl only: the role's check runs this file alone.
"""

from __future__ import annotations

import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

MAGIC = b"~Module signature appended~\n"
TAIL = 12  # algo, hash, id_type, signer_len, key_id_len, three bytes of padding, sig_len (big-endian)
PKCS7 = 2


class Unsigned(Exception):
    """The module has no signature that this certificate verifies; the message says why."""


def parts(content: bytes) -> tuple[bytes, bytes]:
    """The module without its signature, and the signature's PKCS#7 message (DER)."""
    if not content.endswith(MAGIC):
        raise Unsigned("it is not signed")
    rest = content[: -len(MAGIC)]
    length = int.from_bytes(rest[-4:], "big")
    if len(rest) < TAIL or rest[-TAIL + 2] != PKCS7 or not 0 < length <= len(rest) - TAIL:
        raise Unsigned("its signature is damaged")
    return rest[: -TAIL - length], rest[-TAIL - length : -TAIL]


def verify(module: Path, certificate: Path) -> None:
    """Raise Unsigned unless the module (.ko or .ko.xz) is signed by the key of the certificate (DER)."""
    content = module.read_bytes()
    try:
        body, message = parts(lzma.decompress(content) if module.suffix == ".xz" else content)
    except lzma.LZMAError as problem:
        raise Unsigned(f"it cannot be unpacked: {problem}") from None
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "body").write_bytes(body)
        (place / "message").write_bytes(message)
        openssl(["x509", "-inform", "DER", "-in", str(certificate), "-out", f"{place}/certificate"])
        inputs = ["-binary", "-inform", "DER", "-in", f"{place}/message", "-content", f"{place}/body"]
        # The certificate is pinned, so no chain is built.
        pinned = ["-noverify", "-nointern", "-certfile", f"{place}/certificate", "-out", "/dev/null"]
        openssl(["cms", "-verify", *inputs, *pinned])


def openssl(words: list[str]) -> None:
    done = subprocess.run(["openssl", *words], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        # PROCESS:error:NUMBER:LIBRARY:FUNCTION:REASON:FILE:LINE:
        errors = [line.split(":")[5] for line in done.stderr.splitlines() if line.count(":") > 6]
        raise Unsigned(f"its signature does not verify: {'; '.join(errors) or done.stderr.strip()}")


def faults(modules: list[Path], certificate: Path) -> list[str]:
    """One line for each module that is not signed by the certificate."""
    problems = []
    for module in modules:
        try:
            verify(module, certificate)
        except (Unsigned, OSError) as problem:
            problems.append(f"{module}: {problem}")
    return problems


def main() -> int:
    certificate, *modules = map(Path, sys.argv[1:])
    problems = faults(modules, certificate) if modules else ["there is no module to verify"]
    print("\n".join(problems) if problems else f"{len(modules)} signed")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
