"""Whether the firmware would let the kernel trust the certificate that signs modules, by what mokutil prints.

Its exit code is of no use: 0.7.2, Debian 13's, ends with 1 for a certificate that is enrolled, later ones for one that is not.

The role's check runs this file alone: secure_boot.py CERTIFICATE prints why a reboot is refused, and exits with 1 then.
Standard library and mokutil only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SECONDS = 30
ENROLL = (
    "Run `mokutil --import {certificate}` on the host, choose a password, reboot, and at the console choose Enroll MOK"
    " in the blue screen within 10 seconds and give the password again (docs/operate/gpu.md, Secure Boot)"
)


def mokutil(*words: str) -> str:
    """What mokutil prints, both streams, in English."""
    done = subprocess.run(
        ["mokutil", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.stdout.strip()


def enforced(output: str) -> bool:
    """Whether the kernel refuses unsigned modules, by `mokutil --sb-state`. Unknown words count as yes."""
    if "EFI variables are not supported" in output or "doesn't support Secure Boot" in output:
        return False
    # Validation switched off in shim switches the kernel's off too.
    return "SecureBoot disabled" not in output and "validation is disabled in shim" not in output


def refusal(state: str, tested: str, certificate: Path) -> str:
    """Why a kernel with modules signed by the certificate must not boot; empty if it may.

    STATE: output of `mokutil --sb-state`; TESTED: of `mokutil --test-key CERTIFICATE`.
    """
    if not enforced(state) or tested.endswith((" is already enrolled", "built-in trusted keyring")):
        return ""
    if tested.endswith("is already in the enrollment request"):
        return (
            f"Secure Boot is on and the certificate {certificate} waits for its enrolment: reboot into the kernel that runs"
            " now, and at the console choose Enroll MOK in the blue screen within 10 seconds (docs/operate/gpu.md, Secure Boot)"
        )
    detail = "" if tested.endswith("is not enrolled") else f" (mokutil said {tested!r})"
    return (
        f"Secure Boot is on and the certificate {certificate} is not enrolled{detail}: after a reboot the kernel would load no"
        f" driver. {ENROLL.format(certificate=certificate)}"
    )


def state_of(certificate: Path) -> str:
    """The refusal of this host; empty if it may boot."""
    state = mokutil("--sb-state")
    return refusal(state, mokutil("--test-key", str(certificate)) if enforced(state) else "", certificate)


def main() -> int:
    refused = state_of(Path(sys.argv[1]))
    print(refused, end="")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
