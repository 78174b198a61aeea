"""Records of keys and certificates, and the gateway's table of them, without a gateway."""

import hmac
import logging
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmserve.access.api_keys import (
    PEPPER_BYTES,
    KeyFile,
    KeyFileError,
    KeyTable,
    Record,
    check_pepper,
    edited,
    edited_file,
    end_subject,
    ended,
    new_certificate,
    new_key,
    read_keys,
    replacement,
)
from llmserve.access.client_certificates import Certificate
from llmserve.api.errors import ApiError

PEPPER = b"p" * PEPPER_BYTES
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
PRINT = "ab" * 32


def made(lifetime: timedelta | None = None, **changes: object) -> tuple[str, Record]:
    """A key of ada's and its record, with `changes`."""
    key, record = new_key(PEPPER, "ada", "sales", ["analyst", "rater"], lifetime)
    return key, record.model_copy(update=changes)


def certificate(lifetime: timedelta | None = None, valid: timedelta = DAY) -> Record:
    """The record of a certificate of ada's that is valid for `valid`."""
    shown = Certificate(PRINT, datetime.now(UTC) + valid)
    return new_certificate(shown, "ada", "sales", ["analyst"], lifetime)


def table(folder: Path, *records: Record) -> KeyTable:
    """The table of a file with these records."""
    with edited(folder / "keys.json") as content:
        content.extend(records)
    return KeyTable(folder / "keys.json", PEPPER)


def refusal(error: ApiError | None) -> tuple[int, str]:
    """Status and code."""
    assert error
    return error.status, error.code


def raised(table: KeyTable, key: str) -> tuple[int, str]:
    """Status and code of a key's refusal."""
    with pytest.raises(ApiError) as caught:
        table.holder(key)
    return refusal(caught.value)


def test_a_new_key_has_96_and_192_random_bits_and_its_record_the_hmac() -> None:
    key, record = made()
    prefix, number, secret = key.split("_")
    assert (prefix, number, len(number), len(secret)) == ("llmk", record.id, 12, 48)
    assert record.hash == hmac.digest(PEPPER, key.encode(), "sha256").hex()
    assert (record.subject, record.tenant, record.roles) == ("ada", "sales", ("analyst", "rater"))
    assert (record.kind, record.fingerprint, record.revoked, record.replaces) == ("api_key", None, None, None)
    assert made()[0] != key


def test_times_are_utc_in_whole_seconds_and_the_lifetime_counts_from_now() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    record = made(HOUR)[1]
    assert before <= record.created <= datetime.now(UTC)
    assert record.created.microsecond == 0
    assert record.expires == record.created + HOUR
    assert made()[1].expires is None


def test_a_certificates_record_ends_with_the_certificate_or_earlier() -> None:
    record = certificate()
    assert (record.kind, record.hash, record.fingerprint) == ("certificate", None, PRINT)
    assert (record.subject, record.tenant, record.roles) == ("ada", "sales", ("analyst",))
    assert len(record.id) == 12
    assert record.created.microsecond == 0
    assert timedelta() <= datetime.now(UTC) - record.created < HOUR
    assert record.expires
    assert timedelta(hours=23) < record.expires - record.created < timedelta(hours=25)
    assert certificate(HOUR).expires == certificate(HOUR).created + HOUR
    late = certificate(timedelta(days=9)).expires
    assert late
    assert late < datetime.now(UTC) + 2 * DAY


@pytest.mark.parametrize("proof", [{}, {"hash": "a", "fingerprint": "b"}, {"fingerprint": "b"}])
def test_a_key_without_a_hash_or_with_a_fingerprint_is_no_record(proof: dict[str, str]) -> None:
    content = made()[1].model_dump(exclude={"hash"}) | proof
    with pytest.raises(ValidationError, match="wrong proof"):
        Record.model_validate(content)
    as_certificate = {"fingerprint": proof.get("fingerprint"), "hash": "a"}
    with pytest.raises(ValidationError, match="wrong proof"):
        Record.model_validate(content | {"kind": "certificate"} | as_certificate)


def test_a_pepper_of_16_bytes_is_enough_and_one_of_15_is_not() -> None:
    assert check_pepper(b"x" * 16, "here") == b"x" * 16
    with pytest.raises(KeyFileError, match="from here has 15 bytes: it needs at least 16"):
        check_pepper(b"x" * 15, "here")


def test_a_record_ends_at_its_expiry_or_when_it_is_revoked() -> None:
    now = datetime.now(UTC)
    assert ended(made(HOUR)[1]) is None
    assert ended(made()[1]) is None
    assert refusal(ended(made(expires=now)[1])) == (401, "expired_key")
    assert refusal(ended(made(revoked=now)[1])) == (401, "revoked_key")
    assert refusal(ended(made(revoked=now, expires=now)[1])) == (401, "revoked_key")
    assert ended(certificate()) is None
    for change, code in ({"expires": now}, "expired"), ({"revoked": now}, "revoked"):
        record = certificate().model_copy(update=change)
        assert refusal(ended(record)) == (401, f"{code}_certificate")
        message = getattr(ended(record), "message", "")
        assert f"the client certificate {record.id}" in message
    said = getattr(ended(made(expires=now)[1]), "message", "")
    assert "the API key" in said
    assert now.isoformat() in said


def test_a_replacement_has_the_old_holder_and_the_old_lifetime_unless_another_is_given() -> None:
    old = made(DAY)[1]
    key, new, remaining = replacement(PEPPER, old, HOUR, None)
    assert (new.subject, new.tenant, new.roles, new.replaces) == ("ada", "sales", old.roles, old.id)
    assert new.hash == hmac.digest(PEPPER, key.encode(), "sha256").hex()
    assert new.expires == new.created + DAY
    assert remaining == old.model_copy(update={"expires": new.created + HOUR})
    other = replacement(PEPPER, old, HOUR, 2 * DAY)[1]
    assert other.expires == other.created + 2 * DAY
    assert replacement(PEPPER, made()[1], HOUR, None)[1].expires is None


def test_the_overlap_never_prolongs_the_old_key() -> None:
    old = made(HOUR)[1]
    assert replacement(PEPPER, old, DAY, None)[2].expires == old.expires
    _, new, remaining = replacement(PEPPER, made()[1], DAY, None)
    assert remaining.expires == new.created + DAY


def test_ending_a_subject_revokes_its_live_records_and_replaces_its_block() -> None:
    before = datetime(2026, 1, 1, tzinfo=UTC)
    gone, live, other = made(revoked=before)[1], made()[1], made(subject="eve")[1]
    content = KeyFile(keys=[gone, live, other])
    first, block = end_subject(content, "ada")
    assert (block.subject, block.since.microsecond) == ("ada", 0)
    assert timedelta() <= datetime.now(UTC) - block.since < HOUR
    assert first == [live.model_copy(update={"revoked": block.since})]
    assert content.keys == [gone, *first, other]
    _, eves = end_subject(content, "eve")
    _, again = end_subject(content, "ada")
    assert content.blocked == [eves, again]


def test_the_file_is_replaced_with_mode_0640_and_a_marker_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    os.umask(mask := os.umask(0))
    with edited(path) as records:
        records.append(made()[1])
    first = path.stat()
    assert stat.S_IMODE(first.st_mode) == 0o640
    assert (first.st_uid, first.st_gid) == (tmp_path.stat().st_uid, tmp_path.stat().st_gid)
    marker = tmp_path / ".keys.json.existed"
    assert stat.S_IMODE(marker.stat().st_mode) == 0o644 & ~mask
    assert path.read_bytes().endswith(b"}\n")
    with edited(path):
        pass
    assert path.stat().st_ino != first.st_ino, "readers have either the old file or the new one"
    assert sorted(each.name for each in tmp_path.iterdir()) == [".keys.json.existed", "keys.json"]


def test_an_edit_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made()[1]
    path = table(tmp_path, record).path
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), edited(path) as records:
        records.clear()
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == [".keys.json.existed", "keys.json"]
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="No space"), edited(path) as records:
        records.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_file_marker_and_folder_are_flushed_before_an_edit_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".")[-1])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with edited(tmp_path / "keys.json") as records:
        records.append(made()[1])
    assert len(synced) == 2
    assert len(synced[0]) == 8, "the temporary file, before it takes the old one's place"
    assert synced[1] == tmp_path.name.split(".")[-1]


def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{}x")
    with pytest.raises(KeyFileError, match=r"keys file .*keys\.json \(1 errors in its content\)"):
        read_keys(path)
    with pytest.raises(KeyFileError, match=r"\(1 errors in its content\)"), edited_file(path):
        pass
    path.unlink()
    path.mkdir()
    with pytest.raises(KeyFileError, match="Is a directory"):
        read_keys(path)
    with pytest.raises(KeyFileError, match="it is not a regular file"), edited_file(path):
        pass
    path.rmdir()
    path.symlink_to("loop")
    with pytest.raises(KeyFileError, match="Too many levels of symbolic links"), edited_file(path):
        pass


def test_a_file_that_never_existed_is_empty_and_one_that_is_gone_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert read_keys(path) == KeyFile(format=1, keys=[], blocked=[])
    with edited_file(path) as content:
        assert content == KeyFile()
    path.unlink()
    with pytest.raises(KeyFileError, match="existed and is gone"):
        read_keys(path)


def test_a_key_identifies_its_holder_and_each_wrong_one_is_refused(tmp_path: Path) -> None:
    key, record = made()
    late, expired = made(expires=datetime.now(UTC))
    keys = table(tmp_path, record, expired)
    assert keys.holder(key) == record
    assert raised(keys, f"{key}_") == (401, "malformed_key")
    assert raised(keys, key.rpartition("_")[0]) == (401, "malformed_key")
    assert raised(keys, f"llmk_{record.id}_{'0' * 48}") == (401, "invalid_key")
    assert raised(keys, f"llmk_{'0' * 12}_{'0' * 48}") == (401, "invalid_key")
    assert raised(keys, late) == (401, "expired_key")


def test_a_key_that_was_added_since_is_found_without_waiting(tmp_path: Path) -> None:
    keys = table(tmp_path)
    key, record = made()
    held = certificate()
    with edited(keys.path) as records:
        records += [record, held]
    assert keys.holder(key) == record
    later = KeyTable(keys.path, PEPPER)
    later.certificates = {}
    later.file_stamp = None
    assert later.certificate_holder(PRINT) == held


def test_a_certificate_identifies_its_holder_until_it_ends(tmp_path: Path) -> None:
    held = certificate()
    keys = table(tmp_path, held, made()[1])
    assert keys.certificate_holder(PRINT) == held
    with pytest.raises(ApiError, match=r"unknown_certificate.*cdcd"):
        keys.certificate_holder("cd" * 32)
    with edited(keys.path) as records:
        records[0] = held.model_copy(update={"revoked": datetime.now(UTC)})
    assert keys.refresh()
    with pytest.raises(ApiError) as caught:
        keys.certificate_holder(PRINT)
    assert refusal(caught.value) == (401, "revoked_certificate")


def test_while_the_file_is_unreadable_every_holder_gets_503(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, record = made()
    keys = table(tmp_path, record, certificate())
    good = keys.path.read_bytes()
    assert not keys.refresh()
    keys.path.write_text("{")
    assert keys.refresh()
    assert not keys.refresh()
    assert [each.levelno for each in caplog.records] == [logging.ERROR]
    assert raised(keys, key) == (503, "keys_unreadable")
    with pytest.raises(ApiError) as caught:
        keys.certificate_holder(PRINT)
    assert (caught.value.status, caught.value.headers) == (503, [(b"retry-after", b"5")])
    assert refusal(keys.ended(record.id)) == (401, "revoked_key")
    keys.path.write_bytes(good)
    assert keys.refresh()
    assert keys.holder(key) == record
    assert keys.ended(record.id) is None


def test_a_file_that_vanishes_below_a_running_gateway_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    keys = table(tmp_path, made()[1])
    assert keys.existed
    keys.path.unlink()
    (tmp_path / ".keys.json.existed").unlink()
    assert keys.refresh()
    assert keys.records is None
    never = KeyTable(tmp_path / "never.json", PEPPER)
    assert (never.records, never.existed, never.file_stamp) == ({}, False, None)


def test_the_table_says_why_a_record_ended(tmp_path: Path) -> None:
    live, dead = made()[1], made(revoked=datetime.now(UTC))[1]
    keys = table(tmp_path, live, dead)
    assert keys.ended(live.id) is None
    assert refusal(keys.ended(dead.id)) == (401, "revoked_key")
    assert refusal(keys.ended("unknown")) == (401, "revoked_key")
    with edited_file(keys.path) as content:
        _, block = end_subject(content, "ada")
    assert keys.refresh()
    assert keys.blocked == {"ada": block.since}
