"""Drivers built and signed as on a host: by role gpu's code, Debian's dkms and sign-file, and a key in SoftHSM."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plugin_modules import load
from softhsm import SOFTHSM, Double

dkms = load("module_utils.gpu.dkms")
signing = load("module_utils.gpu.signing")

KEY = "pkcs11:token=llmkeep;object=llm1;type=private"
# roles/gpu/templates/openssl.cnf.j2
CONFIG = f"""openssl_conf = llmkeep
[llmkeep]
providers = providers
[providers]
default = default_provider
pkcs11 = pkcs11_provider
[default_provider]
activate = 1
[pkcs11_provider]
activate = 1
pkcs11-module-path = {SOFTHSM}
pkcs11-module-token-pin = file:$ENV::LLMKEEP_MODULE_PIN
pkcs11-module-quirks = no-deinit
[req]
distinguished_name = name
[name]
"""


def signer(lab: Double) -> tuple[Any, str]:
    """A new key in a new token, how it signs (without a certificate yet), and its public half (PEM)."""
    lab.make_tokens()
    (pair,) = lab.key(tokens=["llmkeep"], signs=True)["key_pairs"]
    config = lab.folder / "openssl.cnf"
    config.write_text(CONFIG)
    way = signing.Signing(lab.folder / "modules.der", str(config), "", str(lab.folder / "user-pin"))
    return way, pair["public_pem"]


def prove(driver: Any, way: Any, places: Any) -> Path:
    """dkms.prove with a configuration of dkms that names the key, as the role writes it; where the modules are.

    The configuration is bound over the machine's own in a mount namespace, which ends with the thread.
    """
    config = places.builds.parent / "framework.conf.d"
    config.mkdir(exist_ok=True)
    (config / "llmkeep.conf").write_text(f'mok_signing_key="{KEY}"\nmok_certificate="{way.certificate}"\n')

    def inside() -> None:
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "--bind", config, "/etc/dkms/framework.conf.d"], check=True)
        dkms.prove(driver, way, places)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(inside).result()
    proven: Path = places.proven(driver)
    return proven
