"""`llm-serve keys` in this process: output, exit codes, and what is in the file afterwards."""

import hmac
import io
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from llmserve import credentials
from llmserve.access import api_keys_cli
from llmserve.access.api_keys import Record, edited, read_keys
from llmserve.cli import main, parser

Said = tuple[int, str, str]
Cli = Callable[..., Said]
WHO = ["--subject", "bob", "--tenant", "sales", "--role", "analyst", "--role", "rater"]
PEPPER = b"the pepper of this host"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The keys file, which does not exist yet."""
    return tmp_path / "keys.json"


@pytest.fixture
def cli(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `llm-serve keys` on that file with that pepper; returns exit code, output and error output."""
    (file.parent / "pepper").write_bytes(PEPPER)

    def run(verb: str, *words: str, given: str = "", pepper: bool = True) -> Said:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        more = (
            ["--pepper-file", str(file.parent / "pepper")]
            if pepper and verb in {"add", "import", "rotate"}
            else []
        )
        code = main(["keys", verb, *words, *more, "--keys-file", str(file)])
        return code, *capsys.readouterr()

    return run


def records(file: Path) -> dict[str, Record]:
    """The records by id."""
    return {record.id: record for record in read_keys(file).keys}


def pem(folder: Path, valid: timedelta = timedelta(days=30)) -> Path:
    """A certificate that is valid for so long."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=60), now + valid)
    path = folder / f"{valid.days}.pem"
    path.write_bytes(made.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return path


def change(file: Path, number: str, **changes: object) -> None:
    with edited(file) as content:
        content[:] = [each.model_copy(update=changes) if each.id == number else each for each in content]


def refused(said: Said, *words: str) -> None:
    """Checks for exit code 1, these words, and an empty output."""
    assert (said[0], said[1]) == (1, "")
    for word in words:
        assert word in said[2]


def test_add_prints_the_key_alone_and_tells_its_holder_beside_it(cli: Cli, file: Path) -> None:
    code, out, err = cli("add", *WHO)
    assert code == 0
    assert re.fullmatch(r"llmk_[0-9a-f]{12}_[0-9a-f]{48}\n", out)
    [record] = records(file).values()
    assert err == f"key {record.id} for bob of sales, valid until for ever; shown only once:\n"
    assert record.hash == hmac.digest(PEPPER, out.strip().encode(), "sha256").hex()
    assert (record.subject, record.tenant, record.roles) == ("bob", "sales", ("analyst", "rater"))
    assert record.expires is None


def test_add_as_json_has_the_key_and_the_record_without_its_hash(cli: Cli, file: Path) -> None:
    code, out, err = cli("add", *WHO, "--expires", "90d", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    [record] = records(file).values()
    assert said.pop("key").startswith(f"llmk_{record.id}_")
    assert said == record.model_dump(mode="json", exclude={"hash"}) | {"state": "live"}
    assert record.expires == record.created + timedelta(days=90)
    hours = json.loads(cli("add", *WHO, "--expires", "99999h", "--json")[1])
    lifetime = datetime.fromisoformat(hours["expires"]) - datetime.fromisoformat(hours["created"])
    assert lifetime == timedelta(hours=99999)


@pytest.mark.parametrize(
    "words",
    [
        ["--expires", "0d"],
        ["--expires", "90"],
        ["--expires", "d"],
        ["--expires", "100000d"],
        ["--expires", "1d1d"],
        ["--subject", "two words"],
        ["--tenant", "../x"],
        ["--role", ""],
        ["--role", "x" * 65],
    ],
)
def test_a_lifetime_or_a_name_of_another_form_is_refused(cli: Cli, file: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli("add", *WHO, *words)
    assert ended.value.code == 2
    assert not file.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["add", *WHO[2:]],
        ["add", *WHO[:2], *WHO[4:]],
        ["add", *WHO[:4]],
        ["revoke"],
        ["revoke", "id", "--subject", "bob"],
        ["revoke", "--subject", "two words"],
        ["revoke", "--subject", "x" * 256],
        ["rotate"],
        ["frobnicate"],
        [],
    ],
)
def test_an_incomplete_command_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["keys", *words])
    assert ended.value.code == 2


def test_what_is_not_said_has_a_default() -> None:
    rotate = parser().parse_args(["keys", "rotate", "ab"])
    assert (rotate.id, rotate.overlap, rotate.expires) == ("ab", timedelta(hours=24), None)
    assert rotate.keys_file == Path("/var/lib/llm-gateway/keys.json")
    assert (rotate.pepper_file, rotate.json) == (None, False)
    for verb in ["list"], ["import"], ["revoke", "ab"]:
        assert parser().parse_args(["keys", *verb]).keys_file == rotate.keys_file
    add = parser().parse_args(["keys", "add", *WHO])
    assert (add.verb, add.certificate, add.expires, add.roles) == ("add", None, None, ["analyst", "rater"])


def test_a_certificate_is_registered_for_one_holder_at_a_time(cli: Cli, file: Path) -> None:
    path = pem(file.parent)
    code, out, err = cli("add", *WHO, "--certificate", str(path), pepper=False)
    [record] = records(file).values()
    assert (code, out, record.kind, record.roles) == (0, "", "certificate", ("analyst", "rater"))
    assert f"certificate {record.id} for bob of sales, SHA-256 {record.fingerprint}, valid until 20" in err
    again = "add", "--subject", "eve", *WHO[2:], "--certificate", str(path), "--json"
    refused(cli(*again), f"already belongs to bob as {record.id}: revoke that first")
    assert list(records(file)) == [record.id]
    change(file, record.id, revoked=datetime.now(UTC))
    code, out, err = cli(*again)
    said = json.loads(out)
    assert (code, err, said["subject"], said["state"]) == (0, "", "eve", "live")
    assert (said["fingerprint"], "hash" in said) == (record.fingerprint, False)
    assert cli("add", *WHO, "--certificate", str(pem(file.parent, timedelta(days=9))))[0] == 0


def test_no_certificate_and_an_expired_one_are_refused(cli: Cli, file: Path) -> None:
    (file.parent / "none.pem").write_text("no certificate")
    refused(cli("add", *WHO, "--certificate", str(file.parent / "none.pem")), "contains no certificate")
    expired = pem(file.parent, timedelta(days=-1))
    refused(cli("add", *WHO, "--certificate", str(expired)), str(expired), "expired at 20")
    assert not file.exists()


def test_the_pepper_comes_from_the_units_credentials_or_is_unsealed(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sealed = file.parent / "credentials", file.parent / "sealed" / "llm-gateway.pepper"
    sealed.parent.mkdir()
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr(credentials, "SEALED", sealed.parent)
    refused(cli("add", *WHO, pepper=False), "there is no pepper", str(sealed), "llm-gateway.pepper")
    program = file.parent / "systemd-creds"
    program.write_text('#!/bin/sh\n[ "$1 $2 $4" = "decrypt --name=llm-gateway.pepper -" ] && cat "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
    sealed.write_bytes(b"of the sealed credential")
    assert api_keys_cli.gateway_pepper(None) == b"of the sealed credential"
    sealed.write_bytes(b"short")
    refused(cli("add", *WHO, pepper=False), "from the credential llm-gateway.pepper has 5 bytes")
    program.write_text("#!/bin/sh\necho 'no such key' >&2; exit 1\n")
    refused(cli("add", *WHO, pepper=False), f"cannot unseal {sealed} (no such key)")
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    refused(cli("add", *WHO, pepper=False), f"cannot unseal {sealed} (no such key)")
    (folder / "llm-gateway.pepper").write_bytes(PEPPER)
    assert api_keys_cli.gateway_pepper(None) == PEPPER
    assert api_keys_cli.gateway_pepper(file.parent / "pepper") == PEPPER
    (folder / "llm-gateway.pepper").write_bytes(b"short")
    refused(cli("add", *WHO, pepper=False), "from the credential llm-gateway.pepper has 5 bytes")
    (file.parent / "pepper").write_bytes(b"short")
    refused(cli("add", *WHO), f"from {file.parent / 'pepper'} has 5 bytes")


def test_list_shows_state_holder_end_and_last_use_of_each_key(cli: Cli, file: Path) -> None:
    first, second, third = (json.loads(cli("add", *WHO, "--json")[1])["id"] for _ in range(3))
    now = datetime.now(UTC).replace(microsecond=0)
    change(file, second, revoked=now)
    change(file, third, expires=now)
    (file.parent / "last-used.json").write_text(json.dumps({first: "2026-11-01T10:00Z"}))
    code, out, err = cli("list")
    assert (code, err) == (0, "")
    both, used = "  bob  sales  analyst,rater  until for ever  last used ", "2026-11-01T10:00:00+00:00"
    assert out.splitlines() == [
        f"{first}  api_key      live   {both}{used}",
        f"{second}  api_key      revoked{both}never",
        f"{third}  api_key      expired  bob  sales  analyst,rater  until {now.isoformat()}  last used never",
    ]
    code, out, err = cli("list", "--json")
    listed = json.loads(out)
    assert (code, err) == (0, "")
    assert [(each["id"], each["state"], each["last_used"]) for each in listed] == [
        (first, "live", used),
        (second, "revoked", None),
        (third, "expired", None),
    ]
    assert not any("hash" in each for each in listed)


def test_list_names_blocked_subjects_beside_its_output(cli: Cli, file: Path) -> None:
    cli("revoke", "--subject", "eve@corp")
    [block] = read_keys(file).blocked
    code, out, err = cli("list")
    assert (code, out) == (0, "")
    assert err == f"eve@corp: tokens issued until {block.since.isoformat()} are rejected\n"


def rotated(cli: Cli, number: str, *words: str) -> dict[str, Any]:
    """The document of `rotate --json`."""
    code, out, err = cli("rotate", number, *words, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_rotate_tells_when_the_old_key_ends(cli: Cli, file: Path) -> None:
    old = json.loads(cli("add", *WHO, "--json")[1])["id"]
    code, out, err = cli("rotate", old, "--overlap", "2h")
    before, new = records(file).values()
    assert (code, new.replaces, out.split("_")[1]) == (0, old, new.id)
    assert before.expires == new.created + timedelta(hours=2)
    assert f"(the old one, {old}, expires {before.expires.isoformat()}); shown only once" in err
    newer = rotated(cli, new.id, "--expires", "3d")
    assert newer["replaces"] == new.id
    after = records(file)
    assert after[newer["id"]].expires == after[newer["id"]].created + timedelta(days=3)
    assert newer["replaced_expires"] == after[new.id].model_dump(mode="json")["expires"]
    assert after[new.id].expires == after[newer["id"]].created + timedelta(days=1)
    assert "replaced_expires" not in json.loads(cli("add", *WHO, "--json")[1])


def test_only_a_live_key_that_was_not_rotated_is_rotated(cli: Cli, file: Path) -> None:
    cli("add", *WHO)
    first, held, gone = (
        json.loads(cli("add", *WHO, "--json")[1])["id"],
        json.loads(cli("add", *WHO, "--certificate", str(pem(file.parent)), "--json")[1])["id"],
        json.loads(cli("add", *WHO, "--json")[1])["id"],
    )
    assert cli("rotate", "unknown") == (
        3,
        "",
        "llm-serve: there is no key 'unknown': 'llm-serve keys list' shows the ids\n",
    )
    refused(cli("rotate", held), f"{held} is a certificate")
    change(file, gone, revoked=datetime.now(UTC))
    refused(cli("rotate", gone), f"{gone} was revoked", "only a valid key")
    second = rotated(cli, first)["id"]
    refused(cli("rotate", first), f"{first} has been replaced by {second}: rotate that one")
    change(file, second, revoked=datetime.now(UTC))
    assert rotated(cli, first)["replaces"] == first, "its successor ended first"


def test_revoke_keeps_the_time_of_the_first_revocation(cli: Cli, file: Path) -> None:
    cli("add", *WHO)
    number = json.loads(cli("add", *WHO, "--json")[1])["id"]
    assert cli("revoke", number) == (0, "", f"key {number} is revoked\n")
    other, record = records(file).values()
    assert (other.revoked, bool(record.revoked)) == (None, True)
    assert record.revoked
    assert record.revoked.microsecond == 0
    assert abs(datetime.now(UTC) - record.revoked) < timedelta(minutes=5)
    change(file, number, revoked=datetime(2026, 1, 1, tzinfo=UTC))
    code, out, err = cli("revoke", number, "--json")
    said = json.loads(out)
    assert (code, err) == (0, "")
    assert (said["id"], said["state"], said["revoked"]) == (number, "revoked", "2026-01-01T00:00:00Z")
    code, out, err = cli("revoke", "unknown", "--json")
    assert (code, out, "'unknown'" in err) == (3, "", True)


def test_revoking_a_subject_tells_its_keys_and_since_when_its_tokens_are_refused(
    cli: Cli, file: Path
) -> None:
    numbers = [json.loads(cli("add", *WHO, "--json")[1])["id"] for _ in range(2)]
    code, out, err = cli("revoke", "--subject", "bob")
    [block] = read_keys(file).blocked
    since = block.since.isoformat()
    what = f"bob: revoked: {', '.join(numbers)}; tokens issued until {since} are rejected\n"
    assert (code, out, err) == (0, "", what)
    assert all(record.revoked for record in records(file).values())
    again = cli("revoke", "--subject", "bob")[2]
    assert "revoked: nothing, there were no live keys; tokens" in again
    code, out, err = cli("revoke", "--subject", "eve!", "--json")
    since = read_keys(file).blocked[-1].since.isoformat()
    assert (code, err) == (0, "")
    assert json.loads(out) == {"subject": "eve!", "revoked": [], "tokens_refused_until": since}


def other_host(cli: Cli, file: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """The output of `keys add --json` of another host, as text and parsed; this host knows nothing of it."""
    out = cli("add", *WHO, "--json", *words)[1]
    with edited(file) as content:
        content.pop()
    return out, json.loads(out)


def test_import_takes_a_key_over_once_with_this_hosts_pepper(cli: Cli, file: Path) -> None:
    cli("add", *WHO)
    given, said = other_host(cli, file)
    number = said["id"]
    assert cli("import", given=given) == (0, "", f"{number} is now valid here\n")
    record = records(file)[number]
    assert record.hash == hmac.digest(PEPPER, said["key"].encode(), "sha256").hex()
    assert cli("import", given=given) == (0, "", f"{number} was already imported\n")
    change(file, number, revoked=datetime(2026, 1, 1, tzinfo=UTC))
    code, out, err = cli("import", "--json", given=given)
    told = json.loads(out)
    assert (code, err, told["imported"], told["state"], told["id"]) == (0, "", False, "revoked", number)
    assert "hash" not in told
    assert len(records(file)) == 2
    fresh, _ = other_host(cli, file)
    told = json.loads(cli("import", "--json", given=fresh)[1])
    assert (told["imported"], told["id"]) == (True, json.loads(fresh)["id"])


def test_import_refuses_another_key_of_the_same_id(cli: Cli, file: Path) -> None:
    given, said = other_host(cli, file)
    cli("import", given=given)
    before = file.read_bytes()
    forged = json.dumps(said | {"key": f"llmk_{said['id']}_{'0' * 48}"})
    refused(cli("import", given=forged), f"{said['id']} is the id of another key here")
    named, held = other_host(cli, file, "--certificate", str(pem(file.parent)))
    before = file.read_bytes()
    refused(cli("import", given=json.dumps(held | {"id": said["id"]})), "another key here")
    assert file.read_bytes() == before
    assert cli("import", given=named, pepper=False)[2] == f"{held['id']} is now valid here\n"
    refused(cli("import", given=json.dumps(held | {"id": "0" * 12})), "already belongs to bob")


def test_import_of_a_rotated_key_ends_the_old_one_as_on_the_other_host_and_never_later(
    cli: Cli, file: Path
) -> None:
    old = json.loads(cli("add", *WHO, "--json")[1])["id"]
    document = rotated(cli, old, "--overlap", "1d")
    ends = datetime.fromisoformat(document["replaced_expires"])
    for here, after in (
        (None, ends),
        (ends - timedelta(hours=1), ends - timedelta(hours=1)),
        (ends + timedelta(1), ends),
    ):
        with edited(file) as content:
            content[:] = [each for each in content if each.id == old]
        change(file, old, expires=here)
        assert cli("import", given=json.dumps(document))[0] == 0
        assert records(file)[old].expires == after
        assert list(records(file)) == [old, document["id"]]
    change(file, old, expires=None)
    cli("import", given=json.dumps(document))
    assert records(file)[old].expires is None, "it was imported before"
    with edited(file) as content:
        content.clear()
    assert cli("import", given=json.dumps(document))[0] == 0
    assert list(records(file)) == [document["id"]], "the old one was never here"


def test_import_refuses_what_is_not_the_output_of_add(cli: Cli, file: Path) -> None:
    given, said = other_host(cli, file)
    without = {name: value for name, value in said.items() if name != "subject"}
    wrong: list[Any] = [
        [], {}, 5, without, said | {"id": "other"}, said | {"key": 7}, said | {"key": said["key"].replace("llmk", "llmx")},
        said | {"surplus": 1}, said | {"replaced_expires": "soon"}, said | {"hash": "ab" * 32},
    ]  # fmt: skip
    for document in ["", given + "x", *map(json.dumps, wrong)]:
        refused(cli("import", given=document), "standard input is not the output of")
    assert records(file) == {}
    large = given[:-2] + " " * (64 * 1024 - len(given)) + "}\n"
    assert cli("import", given=large)[0] == 0
    refused(cli("import", given=" " + large[:-2] + " }"), "standard input is not the output of")
    listed = {**said, "last_used": None}
    assert cli("import", given=json.dumps(listed))[2] == f"{said['id']} was already imported\n"


NUMBER, SECRET, LATER = "0123456789ab", "5" * 48, "2099-01-01T00:00:00Z"
DOCUMENT: dict[str, Any] = {
    "id": NUMBER, "subject": "bob", "tenant": "sales", "roles": ["analyst"], "created": "2026-01-01T00:00:00Z",
    "key": f"llmk_{NUMBER}_{SECRET}",
}  # fmt: skip


def test_import_takes_a_document_that_has_no_more_than_the_holder_and_the_key(cli: Cli, file: Path) -> None:
    assert cli("import", given=json.dumps(DOCUMENT)) == (0, "", f"{NUMBER} is now valid here\n")
    record = records(file)[NUMBER]
    assert record.hash == hmac.digest(PEPPER, DOCUMENT["key"].encode(), "sha256").hex()
    assert (record.subject, record.tenant, record.roles, record.expires) == (
        "bob",
        "sales",
        ("analyst",),
        None,
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "other", "key": f"llmk_other_{SECRET}"}, "id is 'other'"),
        ({"key": f"llmk_{NUMBER[::-1]}_{SECRET}"}, f"the id of the key differs from {NUMBER}"),
        ({"key": f"llmk_{NUMBER}_short"}, "key:"),
        ({"subject": "two words"}, "subject is 'two words'"),
        ({"tenant": "x" * 65}, "tenant is 'xxx"),
        ({"roles": []}, "roles is []"),
        ({"roles": ["../admin"]}, "roles.0 is '../admin'"),
        ({"created": "2026-01-01T00:00:00"}, "created is '2026-01-01T00:00:00'"),
        ({"expires": "2099-01-01T00:00:00"}, "expires is '2099-01-01T00:00:00'"),
        ({"expires": "2025-12-31T00:00:00Z"}, "expires is 2025-12-31T00:00:00+00:00, and created 2026"),
        ({"expires": "2026-01-02T00:00:00Z"}, f"{NUMBER} expired at 2026-01-02T00:00:00+00:00"),
        ({"revoked": "2026-01-02T00:00:00Z"}, "revoked is '2026-01-02T00:00:00Z'"),
        ({"replaces": NUMBER, "replaced_expires": LATER}, f"{NUMBER} replaces itself"),
        ({"replaces": "ab" * 6}, "replaces is 'abababababab', and replaced_expires None"),
        ({"replaced_expires": LATER}, "replaces is None, and replaced_expires 2099"),
        (
            {"replaces": "ab" * 6, "replaced_expires": "2025-12-31T00:00:00Z"},
            "replaced_expires is 2025-12-31T00:00:00+00:00, and created 2026",
        ),
        ({"kind": "certificate"}, "kind certificate comes with key: an api_key needs a key; a certificate needs"),
        ({"key": None}, "kind api_key comes with none of them: an api_key needs a key"),
        ({"fingerprint": "ab" * 32}, "kind api_key comes with key and fingerprint"),
        ({"key": None, "kind": "certificate"}, "kind certificate comes with none of them"),
        ({"key": None, "kind": "certificate", "certificate": "no PEM"}, "the field certificate contains no certificate"),
        ({"key": None, "kind": "certificate", "fingerprint": "ab"}, "fingerprint is 'ab'"),
        ({"state": ["live"], "surplus": SECRET}, "surplus: Extra inputs"),
    ],
)  # fmt: skip
def test_import_names_the_field_of_a_record_that_makes_no_sense(
    cli: Cli, file: Path, changes: dict[str, Any], reason: str
) -> None:
    said = cli("import", given=json.dumps(DOCUMENT | changes))
    refused(said, reason)
    assert SECRET not in said[2]
    assert not file.exists() or records(file) == {}


def test_import_hashes_a_certificate_here_and_ends_the_record_with_it_at_the_latest(
    cli: Cli, file: Path
) -> None:
    path = pem(file.parent)
    cli("add", *WHO, "--certificate", str(path))
    [added] = records(file).values()
    assert added.expires
    for expires, ends in (None, added.expires), (LATER, added.expires), ("2026-02-01T00:00:00Z", None):
        file.write_text("{}")
        document = DOCUMENT | {
            "kind": "certificate",
            "certificate": path.read_text(),
            "expires": expires,
            "key": None,
        }
        said = cli("import", given=json.dumps(document), pepper=False)
        if ends is None:
            refused(said, f"{NUMBER} expired at 2026-02-01")
            continue
        assert said == (0, "", f"{NUMBER} is now valid here\n")
        record = records(file)[NUMBER]
        assert (record.kind, record.fingerprint, record.expires) == ("certificate", added.fingerprint, ends)


@pytest.mark.parametrize(
    ("field", "value", "here"),
    [("subject", "eve", "bob"), ("tenant", "bank", "sales"), ("roles", ["admin"], "analyst, rater")],
)
def test_a_key_of_another_holder_neither_ends_a_key_here_nor_passes_for_one(
    cli: Cli, file: Path, field: str, value: object, here: str
) -> None:
    old = json.loads(cli("add", *WHO, "--json")[1])
    document = rotated(cli, old["id"], "--overlap", "1h")
    with edited(file) as content:
        content[:] = [each.model_copy(update={"expires": None}) for each in content if each.id == old["id"]]
    before = file.read_bytes()
    there = ", ".join(value) if isinstance(value, list) else value
    for given in document | {field: value}, old | {field: value}:
        said = cli("import", given=json.dumps(given))
        refused(said, f"the {field} of {old['id']} is {here} here, and {there} in the record {given['id']}")
    assert file.read_bytes() == before


def test_a_key_does_not_replace_a_certificate(cli: Cli, file: Path) -> None:
    held = json.loads(cli("add", *WHO, "--certificate", str(pem(file.parent)), "--json")[1])
    document = DOCUMENT | {"roles": ["analyst", "rater"], "replaces": held["id"], "replaced_expires": LATER}
    refused(cli("import", given=json.dumps(document)), f"{held['id']} is a certificate here")
