"""Versions are ordered as their ecosystems order them: dpkg judges Debian's."""

import subprocess
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkeep.vulnerabilities.versions import Unparsable, debian, npm, pypi

CASES = ["1.0", "1.0~rc1", "1.0-1", "1.0-1+b1", "1:0.9-1", "1.0+dfsg-1", "1.0a", "1.0~~", "1.0~", "6.12.48-1",
         "2.0-1~bpo13+1", "2.0-1", "0", "1.00", "1.0-00", "1.0-1~deb13u1", "0.9.9", "1.0.", "1:1.0"]  # fmt: skip


def dpkg_says(one: str, operator: str, other: str) -> bool:
    done = subprocess.run(
        ["dpkg", "--compare-versions", one, operator, other], check=False, stderr=subprocess.DEVNULL
    )
    return done.returncode == 0


@settings(max_examples=100, deadline=None)
@given(*[st.one_of(st.sampled_from(CASES), st.from_regex(r"[0-9][0-9aZ.+~-]{0,6}", fullmatch=True))] * 2)
def test_debians_versions_are_ordered_as_dpkg_orders_them(one: str, other: str) -> None:
    try:
        keys = debian(one), debian(other)
    except Unparsable:
        assert "-" in (one[-1], other[-1])
        return
    operator = "lt" if keys[0] < keys[1] else "eq" if keys[0] == keys[1] else "gt"
    assert dpkg_says(one, operator, other)


@pytest.mark.parametrize(
    "text", ["", "1.0-", "abc", "1.0 ", "1.0\n", "1.0;", "x:1.0", "-1", "1" * 300, "١.0"]
)
def test_what_is_no_version_of_debians_is_refused(text: str) -> None:
    with pytest.raises(Unparsable, match="is not a Debian version"):
        debian(text)


def test_npms_versions_are_ordered_as_semver_orders_its_own_example() -> None:
    texts = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11",
             "1.0.0-rc.1", "1.0.0", "2.0.0", "2.1.0", "2.1.1", "10.0.0"]  # fmt: skip
    assert all(npm(one) < npm(other) for one, other in pairwise(texts))
    assert npm("1.0.0+build.1") == npm("v1.0.0")


@pytest.mark.parametrize("key", [npm, pypi])
def test_what_is_no_version_is_refused(key: object) -> None:
    for text in ("latest", "1.x", "1.0.0 || 2.0.0", ""):
        with pytest.raises(Unparsable):
            key(text)  # type: ignore[operator]
