"""What an estate gives its replicas beside the manifests: a tiny model, Secrets, a signed policy."""

import json
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import small_policy
from cluster_keys import ClusterKeys
from plugin_modules import ROOT
from pod_here import SERVING

from llmkeep.policy import source as policy_source

MODEL = "smollm2-135m-instruct"
HOSTS = ("ops1", "llm1")  # with a certificate each
PEPPER = b"a pepper for tests, 32 bytes long"
Given = dict[str, dict[str, bytes]]
MAKE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/helpers")
from llmcore.manifest import write_manifest
from tiny import make_model
folder = Path(sys.argv[1])
make_model(folder)
write_manifest(folder, folder / "SHA256SUMS")
"""


def tiny_weights(folder: Path) -> Path:
    """A folder of models, with a tiny one under the name of the manifests'."""
    argv = [str(SERVING / "python"), "-c", MAKE, str(folder / MODEL)]
    subprocess.run(argv, cwd=ROOT / "payload", check=True, capture_output=True)
    subprocess.run(["chmod", "--recursive", "a+rX", folder], check=True)  # as role llm_serving installs them
    return folder


def pod_given(folder: Path, subjects: Iterable[str] = ("ada",)) -> Given:
    """Contents by name of the object, and under `test` what its clients need: each subject's key, and certificates of hosts."""
    keys = ClusterKeys(folder, ["127.0.0.1"])
    certificate, key = keys.issued("llm", server=True)
    clients = [path for host in HOSTS for path in keys.issued(host)]
    (folder / "pepper").write_bytes(PEPPER)
    added = {}
    for subject in subjects:
        argv: list[str | Path] = [
            SERVING / "llm-serve",
            "keys",
            "add",
            "--subject",
            subject,
            "--tenant",
            "research",
        ]
        argv += ["--role", "developer", "--json", "--pepper-file", folder / "pepper"]
        argv += ["--keys-file", folder / "keys.json"]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        added[subject] = json.loads(done.stdout)["key"].encode()
    policy_key = small_policy.new_key()
    policy = policy_source.read(ROOT / "policy")
    bundle = policy_source.pack(policy, 1, datetime.now(UTC) + timedelta(days=9), policy_key)
    return {
        "llm-gateway": {"llm-gateway.pepper": PEPPER},
        "llm-audit": {"llm-audit.seed": b"5e" * 32},
        "llm-keys": {"keys.json": (folder / "keys.json").read_bytes()},
        "llm-edge-tls": {
            "tls.crt": certificate.read_bytes(),
            "tls.key": key.read_bytes(),
            "ca.crt": keys.ca.read_bytes(),
        },
        "llm-policy": {"bundle.tar.gz": bundle, "policy.pem": small_policy.public(policy_key).encode()},
        "test": {**{path.name: path.read_bytes() for path in (keys.ca, *clients)}, **added},
    }
