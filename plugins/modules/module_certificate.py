#!/usr/bin/python
"""State module: the certificate of the HSM's key that signs kernel modules."""

from __future__ import annotations

DOCUMENTATION = r"""
module: module_certificate
short_description: Make the certificate by which a kernel verifies modules that a key in an HSM signed
description:
  - Self-signed and for code signing, as shim's MokManager enrols it (DER). It is made again only if the key is another one,
    since a new certificate has to be enrolled at the machine's console.
  - The PIN is read from a sealed credential into a memory file, and appears in no argument, environment or output.
author: [llmkeep contributors (@llmkeep)]
options:
  path: {description: The certificate., type: path, required: true}
  name: {description: Common name., type: str, required: true}
  key: {description: PKCS#11 URI of the private key., type: str, required: true}
  public_key: {description: "Public key (PEM), as M(llmkeep.estate.hsm_key) returns it.", type: str, required: true}
  openssl_config: {description: OpenSSL's configuration that names the PKCS#11 module., type: path, required: true}
  address: {description: "Address of p11-kit's server, as C(unix:path=SOCKET).", type: str, default: ""}
  pin: {description: Sealed credential that holds the PIN., type: path, required: true}
"""

EXAMPLES = r"""
- name: Make the certificate of the key that signs modules
  llmkeep.estate.module_certificate:
    path: /etc/llmkeep/modules/modules.der
    name: llm1.estate.internal kernel modules
    key: pkcs11:token=llmkeep;object=llm1-modules;type=private
    public_key: "{{ key.key_pairs[0].public_pem }}"
    openssl_config: /etc/llmkeep/modules/openssl.cnf
    pin: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
"""

RETURN = r"""
path: {description: The certificate., returned: always, type: str}
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import signing
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm.key_pair import Fault


def settle(parameters: dict[str, Any], check: bool) -> bool:
    """Apply; whether that took a change."""
    if signing.certifies(Path(parameters["path"]), parameters["public_key"]):
        return False
    if not check:
        way = signing.Signing(
            Path(parameters["path"]), parameters["openssl_config"], parameters["address"], parameters["pin"]
        )
        signing.certify(way, parameters["key"], parameters["name"])
    return True


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "key": {"type": "str", "required": True, "no_log": False},
            "public_key": {"type": "str", "required": True},
            "openssl_config": {"type": "path", "required": True},
            "address": {"type": "str", "default": ""},
            "pin": {"type": "path", "required": True, "no_log": False},
        },
        supports_check_mode=True,
    )
    try:
        changed = settle(module.params, module.check_mode)
    except (signing.Failed, Fault, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=changed, path=module.params["path"])


if __name__ == "__main__":
    main()
