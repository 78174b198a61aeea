"""The policy key signs policies and break-glass grants: a grant is never taken for the signature of a policy."""

import jwt
import policies
import pytest
from plugin_modules import load

from llmkeep.places import Places
from llmkeep.policy import bundle as policy
from llmkeep.policy.source import canonical, packed
from llmproof import policy_bundle

placed = load("module_utils.bundle.policy")


def test_a_break_glass_grant_is_no_signature_of_a_policy(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: Places = policies.control_node(tmp_path_factory.mktemp("control"), monkeypatch)
    policy.build(places, policies.SOURCE, places.policy_bundle, 90)
    files = policy_bundle.unpacked(places.policy_bundle.read_bytes())
    grant = policy.break_glass(places, "corp", "ada", ["POST /generate"], 1, "OPA is down")
    key = places.policy_public.read_bytes()
    assert jwt.decode(grant, key, ["ES256"], audience="llmkeep-break-glass")["sub"] == "ada"
    bundle = packed(files | {policy_bundle.SIGNATURES: canonical({"signatures": [grant]})})
    with pytest.raises(policy_bundle.PolicyRefused, match="Invalid audience") as refused:
        policy_bundle.judged(bundle, key)
    assert refused.value.code == policy_bundle.UNSIGNED
    with pytest.raises(placed.Refused, match=r"is not a signature .*'files'"):
        placed.opened(bundle, key.decode())
