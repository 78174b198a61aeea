"""Licences as SPDX expressions, and the policy that denies some and asks for others."""

import pytest

from llmkeep.bundle import licences, lock
from llmkeep.bundle.licences import Policy
from llmkeep.errors import LlmkeepError

POLICY = Policy(["SSPL-*"], ["AGPL-*", "*nvidia*"], ["*nvidia*"])


@pytest.mark.parametrize(
    ("stated", "expression"),
    [
        ("GPL-2+", "GPL-2.0-or-later"),
        ("LGPL", "LGPL-2.0-or-later"),
        ("GFDL-NIV-1.3+", "GFDL-1.3-no-invariants-or-later"),
        ("Expat AND BSD-3-clause AND Expat", "MIT AND BSD-3-Clause"),
        ("BSD-3-clause or GPL-2 AND MIT/X11", "(BSD-3-Clause OR GPL-2.0-only) AND MIT"),
        ("Apache-2.0 AND MIT AND MIT or Apache-2.0", "Apache-2.0 AND MIT AND (MIT OR Apache-2.0)"),
        ("GPL-2+ or AFL-2.1, and Expat", "(GPL-2.0-or-later OR AFL-2.1) AND MIT"),
        ("GPL-2 with Linux-syscall-note exception", "GPL-2.0-only WITH Linux-syscall-note"),
        ("MIT License AND Apache Software License", "MIT AND Apache-2.0"),
        ("Apache-2.0 OR BSD-2-Clause", "Apache-2.0 OR BSD-2-Clause"),
        ("Apache-2.0 (weights, upstream); MIT License (package)", "Apache-2.0"),
        ("LicenseRef-NVIDIA-Proprietary", "LicenseRef-NVIDIA-Proprietary"),
        ("", "NOASSERTION"),
        ("NOASSERTION", "NOASSERTION"),
    ],
)
def test_a_stated_licence_becomes_spdx(stated: str, expression: str) -> None:
    assert licences.spdx(stated) == expression


@pytest.mark.parametrize(
    ("stated", "expression"),
    [
        ("Beerware of <me>\x1b[2J", "LicenseRef-Beerware-of-me-2J"),
        ("((((", "LicenseRef-unnamed"),
        ("GPL-2+ with OpenSSL exception", "LicenseRef-GPL-2-or-later-with-OpenSSL-exception"),
        ("MIT OR", "LicenseRef-MIT-OR"),
    ],
)
def test_what_spdx_does_not_have_becomes_a_reference_that_spdx_reads(stated: str, expression: str) -> None:
    assert licences.spdx(stated) == expression
    assert licences.spdx(expression) == expression


def test_each_licence_of_the_lock_is_an_expression() -> None:
    pinned = lock.load(profiles=["gpu", "gpu-debian"])
    stated = {each.licence for each in [*pinned.debs.values(), *pinned.wheels.values()]}
    expressions = {licences.spdx(each) for each in stated}
    assert {licences.spdx(each) for each in expressions} == expressions


def faults(stated: dict[str, str], *accepted: str) -> list[str]:
    return list(licences.faults(POLICY, "ours", accepted, stated))


def test_a_denied_licence_is_refused_even_where_the_profile_names_it() -> None:
    (fault,) = faults({"mongodb=7": "Expat AND SSPL-1.0"}, "SSPL-1.0")
    assert fault.startswith(
        "the licence 'SSPL-1.0' of mongodb=7 is denied by licences of artifacts.yml: remove "
    )


def test_a_licence_that_is_asked_for_is_refused_until_the_profile_names_it() -> None:
    stated = {"libcuda1=1": "MIT AND NVIDIA-EULA", "ghostscript=1": "AGPL-3+"}
    assert [fault.split(" is not accepted")[0] for fault in faults(stated)] == [
        "the licence 'NVIDIA-EULA' of libcuda1=1",
        "the licence 'AGPL-3+' of ghostscript=1",
    ]
    assert not faults(stated, "NVIDIA-EULA", "AGPL-3.0-or-later")


def test_an_artifact_that_states_no_licence_is_asked_for_by_its_name() -> None:
    (fault,) = faults({"nvidia-new==1": "NOASSERTION", "zlib1g=1": "NOASSERTION"})
    assert fault.startswith("the licence 'NOASSERTION' of nvidia-new==1 is not accepted")


def test_one_alternative_that_is_accepted_is_enough() -> None:
    assert not faults({"ours=1": "SSPL-1.0 or Apache-2.0"})
    assert faults({"ours=1": "SSPL-1.0 or AGPL-3+"})


def test_the_tree_s_profiles_have_only_licences_that_they_accept() -> None:
    wanted = lock.catalogue()
    for profile in ("lab", "gpu", "gpu-debian"):
        lock.require_fit(wanted, profile, lock.load(profiles=lock.apart(wanted, profile).values()))


def test_a_lock_with_a_denied_licence_is_refused_with_the_name_of_the_package() -> None:
    wanted = lock.catalogue()
    wanted["licences"]["deny"] += ["curl"]
    with pytest.raises(LlmkeepError, match=r"nothing was changed:\n  the licence 'curl' of apt="):
        lock.require_fit(wanted, "lab", lock.load())


@pytest.mark.parametrize("written", [["MIT"], {"deny": "MIT"}, {"forbid": ["MIT"]}])
def test_a_policy_that_is_none_is_refused(written: object) -> None:
    with pytest.raises(LlmkeepError, match="write lists under ask, ask_unstated, deny"):
        Policy.read({"licences": written})
