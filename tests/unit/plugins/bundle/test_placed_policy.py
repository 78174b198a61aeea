"""policy_bundle refuses what is not the control node's newest policy, keeps what was there, and agrees with real OPA."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import policies
import pytest
import small_policy
from plugin_modules import ROOT, load

policy = load("module_utils.bundle.policy")
policy_bundle = load("modules.policy_bundle")

KEY, FOREIGN = small_policy.new_key(), small_policy.new_key()
PEM = small_policy.public(KEY)


@pytest.fixture(scope="session")
def opa() -> Path:
    """The OPA of the lock, as hosts run it."""
    return policies.opa()


def run(
    folder: Path, bundle: bytes, key: str = PEM, check: bool = False, path: str = "/usr/bin:/bin"
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the module answers, run as Ansible runs it, and what lies below FOLDER afterwards."""
    arguments = {
        "key": key,
        "bundle": small_policy.base64_of(bundle),
        "key_path": str(folder / "policy.pem"),
        "path": str(folder / "bundle.tar.gz"),
        "seen": str(folder / "revision"),
        "_ansible_check_mode": check,
        "_ansible_diff": True,
    }
    done = subprocess.run(
        [sys.executable, "-m", "ansible_collections.llmkeep.estate.plugins.modules.policy_bundle"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT / ".ansible/collections"), "PATH": path},
    )
    assert done.stdout, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    present = {path.name: small_policy.sha256(path.read_bytes()) for path in folder.iterdir()}
    return answer, present


def test_puts_a_policy_in_place_once_and_says_which(tmp_path: Path) -> None:
    bundle = small_policy.signed(small_policy.files(7), KEY)
    answer, present = run(tmp_path, bundle)
    assert answer["changed"]
    assert answer["diff"] == {"before": "policy revision 0\n", "after": "policy revision 7\n"}
    assert answer["ansible_facts"]["llmkeep_policy"]["revision"] == 7
    assert present["bundle.tar.gz"] == small_policy.sha256(bundle)
    assert (tmp_path / "bundle.tar.gz").stat().st_mode & 0o777 == 0o644
    again, _ = run(tmp_path, bundle)
    assert not again["changed"]


def test_check_mode_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    answer, present = run(tmp_path, small_policy.signed(small_policy.files(7), KEY), check=True)
    assert answer["changed"]
    assert present == {}


def test_check_mode_verifies_nothing_where_openssl_is_still_to_be_installed(tmp_path: Path) -> None:
    answer, present = run(tmp_path, b"not verified", check=True, path="/nonexistent")
    assert answer["changed"]
    assert "was not verified here" in answer["warnings"][0]["event"]["msg"]
    assert (answer["ansible_facts"]["llmkeep_policy"], present) == ({"key": PEM}, {})
    refused, _ = run(tmp_path, b"not verified", path="/nonexistent")
    assert refused["failed"]


def test_a_newer_policy_and_a_new_key_replace_the_old(tmp_path: Path) -> None:
    run(tmp_path, small_policy.signed(small_policy.files(7), KEY))
    assert run(tmp_path, small_policy.signed(small_policy.files(8), KEY))[0]["changed"]
    newer = small_policy.signed(small_policy.files(9), FOREIGN)
    assert run(tmp_path, newer, small_policy.public(FOREIGN))[0]["changed"]
    assert (tmp_path / "policy.pem").read_text() == small_policy.public(FOREIGN)


def test_the_same_policy_signed_anew_is_taken(tmp_path: Path) -> None:
    run(tmp_path, small_policy.signed(small_policy.files(7), KEY))
    assert run(tmp_path, small_policy.signed(small_policy.files(7), KEY))[0]["changed"]


def test_a_file_that_somebody_touched_is_mended(tmp_path: Path) -> None:
    bundle = small_policy.signed(small_policy.files(7), KEY)
    run(tmp_path, bundle)
    (tmp_path / "bundle.tar.gz").write_bytes(b"")
    (tmp_path / "policy.pem").chmod(0o666)
    answer, present = run(tmp_path, bundle)
    assert answer["changed"]
    assert present["bundle.tar.gz"] == small_policy.sha256(bundle)
    assert (tmp_path / "policy.pem").stat().st_mode & 0o777 == 0o644


GOOD = small_policy.files(8)
OPEN = small_policy.REGO.replace('"allow": false', '"allow": true')


def with_signatures(content: dict[str, bytes], of: dict[str, bytes]) -> bytes:
    """Files that carry the signature of others."""
    return small_policy.packed({**content, ".signatures.json": small_policy.signatures(of, KEY, {})})


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "no signature": (lambda: small_policy.packed(GOOD), "has no .signatures.json"),
    "a signature by another key": (lambda: small_policy.signed(GOOD, FOREIGN), "does not match"),
    "a signature under another key's name": (
        lambda: small_policy.signed(GOOD, KEY, {"kid": "default"}),
        "('ES256', 'default', '', ['SHA-256'])",
    ),
    "a signature for another scope": (lambda: small_policy.signed(GOOD, KEY, scope="write"), "'write'"),
    "a signature with a shared secret": (
        lambda: small_policy.signed(GOOD, "x" * 40, {"alg": "HS256"}),
        "('HS256', 'policy'",
    ),
    "no signature but the word for it": (
        lambda: small_policy.signed(GOOD, None, {"alg": "none"}),
        "('none', 'policy'",
    ),
    "two signatures": (
        lambda: small_policy.packed({**GOOD, ".signatures.json": b'{"signatures": ["a.b.c", "a.b.c"]}'}),
        "is not a signature",
    ),
    "a changed rule": (lambda: with_signatures(small_policy.files(8, rego=OPEN), GOOD), "authz.rego of"),
    "changed data": (lambda: with_signatures(small_policy.files(9), GOOD), "differs from what was signed"),
    "a file more": (
        lambda: with_signatures(small_policy.files(8, **{"llm/x.rego": "package llm.x"}), GOOD),
        "llm/x.rego of",
    ),
    "a file less": (
        lambda: with_signatures({name: GOOD[name] for name in (".manifest", "data.json")}, GOOD),
        "authz.rego of",
    ),
    "roots beyond its own": (
        lambda: small_policy.signed(
            small_policy.files(8, **{".manifest": '{"revision": "8", "roots": ["llm", "system"]}'}), KEY
        ),
        "roots ['llm', 'system']",
    ),
    "two revisions": (
        lambda: small_policy.signed(
            small_policy.files(8, **{".manifest": '{"revision": "9", "roots": ["llm"]}'}), KEY
        ),
        "revision 9 and 8",
    ),
    "JSON in another form than the one that is hashed": (
        lambda: with_signatures({**GOOD, "data.json": GOOD["data.json"].replace(b",", b", ")}, GOOD),
        "data.json of",
    ),
    "no revision": (
        lambda: small_policy.signed(small_policy.files(8, **{"data.json": "{}"}), KEY),
        "KeyError: 'llm'",
    ),
    "an expiry that is past": (
        lambda: small_policy.signed(small_policy.files(8, expires="2026-01-01T00:00:00Z"), KEY),
        "revision 8 expired at 2026-01-01",
    ),
    "an older revision": (
        lambda: small_policy.signed(small_policy.files(6), KEY),
        "is revision 6, but this host has had 7",
    ),
    "another policy under the revision in place": (
        lambda: small_policy.signed(small_policy.files(7, rego=OPEN), KEY),
        "call themselves revision 7",
    ),
    "a file twice": (
        lambda: small_policy.packed(
            {**GOOD, ".signatures.json": small_policy.signatures(GOOD, KEY, {})},
            ("llm/authz/authz.rego", OPEN.encode()),
        ),
        "is a duplicate",
    ),
    "half of it": (lambda: small_policy.signed(GOOD, KEY)[:300], "cannot be unpacked"),
    "no tarball": (lambda: b"policy", "cannot be unpacked"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_policy_is_refused_and_the_one_before_stays_with(tmp_path: Path, what: str) -> None:
    make, told = REFUSED[what]
    _, before = run(tmp_path, small_policy.signed(small_policy.files(7), KEY))
    answer, after = run(tmp_path, make())
    assert answer["failed"]
    assert told in answer["msg"]
    assert "Nothing was changed" in answer["msg"]
    assert after == before


def test_an_old_policy_is_refused_where_the_newer_one_was_removed(tmp_path: Path) -> None:
    run(tmp_path, small_policy.signed(small_policy.files(7), KEY))
    (tmp_path / "bundle.tar.gz").unlink()
    answer, present = run(tmp_path, small_policy.signed(small_policy.files(6), KEY))
    assert "this host has had 7" in answer["msg"]
    assert "bundle.tar.gz" not in present


@pytest.mark.parametrize(
    "key", ["", "no key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_a_key_that_is_none_is_told(tmp_path: Path, key: str) -> None:
    answer, _ = run(tmp_path, small_policy.signed(GOOD, KEY), key)
    assert "is not a public key on P-256" in answer["msg"]


# OPA heeds neither revisions nor expiry, takes any name in the header, and lets the last of two files win.
OURS_ALONE = {
    "a signature under another key's name",
    "roots beyond its own",
    "two revisions",
    "no revision",
    "an expiry that is past",
    "an older revision",
    "another policy under the revision in place",
    "a file twice",
    "JSON in another form than the one that is hashed",
}


def opa_takes(opa: Path, folder: Path, bundle: bytes) -> bool:
    """Does real OPA believe the signature?"""
    small_policy.write(folder, bundle, PEM)
    key, path = folder / "etc/llmkeep/policy/policy.pem", folder / "var/lib/llmkeep/policy/bundle.tar.gz"
    done = subprocess.run(
        [opa, "build", "--bundle", path, "--verification-key", key, "--verification-key-id", "policy",
         "--signing-alg", "ES256", "--output", folder / "out.tar.gz"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode == 0


def test_opa_takes_a_policy_that_is_taken(tmp_path: Path, opa: Path) -> None:
    assert opa_takes(opa, tmp_path, small_policy.signed(GOOD, KEY))


@pytest.mark.parametrize("what", sorted(set(REFUSED) - OURS_ALONE))
def test_opa_refuses_too_a_policy_with(tmp_path: Path, opa: Path, what: str) -> None:
    assert not opa_takes(opa, tmp_path, REFUSED[what][0]())
