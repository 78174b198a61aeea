#!/usr/bin/python
"""State module: a driver's kernel modules, proven by a build in a scratch folder before they are installed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dkms_build
short_description: Build a driver's kernel modules for a kernel that does not run yet, and install what was proven
description:
  - C(proven) builds by C(dkms build) in a scratch folder, for a kernel whose headers need not be installed. A failure names
    file, line and kernel, and leaves C(/lib/modules), C(/usr/src) and C(/var/lib/dkms) as they were.
  - With I(certificate), dkms signs through OpenSSL's PKCS#11 provider, and every module is verified by C(openssl cms) without
    being loaded. dkms itself goes on when signing fails.
  - C(installed) takes the modules that were proven, and builds nothing. Modules of other kernels stay.
author: [llmkeep contributors (@llmkeep)]
options:
  name: {description: "Name of the driver in its C(dkms.conf).", type: str, required: true}
  version: {description: Version of the driver., type: str, required: true}
  kernel: {description: "Release of the kernel, as C(uname -r) prints it.", type: str, required: true}
  package: {description: "Debian package with the sources; empty if they lie in C(/usr/src).", type: str, default: ""}
  state: {description: How far to go., type: str, choices: [proven, installed], default: proven}
  certificate: {description: "Certificate (DER) that verifies the modules; empty for unsigned modules.", type: path}
  openssl_config: {description: OpenSSL's configuration that names the PKCS#11 module., type: path}
  address: {description: "Address of p11-kit's server, as C(unix:path=SOCKET).", type: str, default: ""}
  pin: {description: Sealed credential that holds the PIN., type: path}
"""

EXAMPLES = r"""
- name: Build the driver for the kernel that boots next
  llmkeep.estate.dkms_build:
    name: nvidia
    version: 580.105.08
    kernel: 6.12.118+deb13-amd64
    package: nvidia-kernel-open-dkms=580.105.08-*
    certificate: /etc/llmkeep/modules/modules.der
    openssl_config: /etc/llmkeep/modules/openssl.cnf
    pin: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
"""

RETURN = r"""
installed: {description: "Whether it was installed, signed as asked, before this call.", returned: always, type: bool}
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import dkms
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu.signing import Signing
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm.key_pair import Fault


def settle(parameters: dict[str, Any], check: bool, places: dkms.Places) -> dict[str, Any]:
    """Apply; what the module returns."""
    driver = dkms.Driver(
        parameters["name"], parameters["version"], parameters["kernel"], parameters["package"]
    )
    signing = None
    if parameters["certificate"]:
        signing = Signing(
            Path(parameters["certificate"]),
            parameters["openssl_config"],
            parameters["address"],
            parameters["pin"],
        )
    installed = dkms.is_installed(driver, signing, places)
    done = installed or (parameters["state"] == "proven" and places.proven(driver).exists())
    if not done and not check:
        (dkms.install if parameters["state"] == "installed" else dkms.prove)(driver, signing, places)
    return {"changed": not done, "installed": installed}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "kernel": {"type": "str", "required": True},
            "package": {"type": "str", "default": ""},
            "state": {"type": "str", "choices": ["proven", "installed"], "default": "proven"},
            "certificate": {"type": "path"},
            "openssl_config": {"type": "path"},
            "address": {"type": "str", "default": ""},
            "pin": {"type": "path", "no_log": False},
        },
        required_together=[("certificate", "openssl_config", "pin")],
        supports_check_mode=True,
    )
    try:
        result = settle(module.params, module.check_mode, dkms.Places())
    except (dkms.Failed, Fault, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
