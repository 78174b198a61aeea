"""API keys: authentication, and how soon revocation and expiry take effect."""

import hmac
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from questions import LASTING, error, lines_of, ready
from service import PEPPER, Service, eventually, running

from llmserve.access.api_keys import (
    KeyFileError,
    KeyTable,
    Record,
    edited,
    edited_file,
    end_subject,
    new_key,
    read_keys,
)
from llmserve.access.last_used import LastUsed, read_last_used
from llmserve.api.errors import ApiError


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose keys file may be damaged."""
    with running(tmp_path_factory.mktemp("keys")) as service:
        yield service


def status(service: Service, key: str) -> int:
    """Status of a request with this key."""
    with service.client(key) as client:
        return client.get("/generate?prompt=x").status_code


def test_a_wrong_or_malformed_or_missing_key_is_401(echo: Service) -> None:
    def refusal(header: str | None, code: str) -> str:
        with echo.client("") as client:
            answer = client.get("/v1/models", headers={"authorization": header} if header is not None else {})
        assert answer.headers["www-authenticate"].startswith("Bearer")
        message: str = error(answer, 401, code)["message"]
        return message

    prefix, number, secret = echo.key.split("_")
    refusal(None, "missing_key")
    for malformed in (
        "",
        "Bearer",
        "Basic YTpi",
        f"Bearer sk-{secret}",
        f"Bearer {echo.key}_more",
        "x" * 5000,
    ):
        refusal(malformed, "malformed_key")
    refusal(f"Bearer {prefix}_{number}_{secret[::-1]}", "invalid_key")
    refusal(f"Bearer {prefix}_000000000000_{secret}", "invalid_key")
    refusal(f"Bearer {prefix}_{number}_{secret[:-1]}", "invalid_key")
    assert secret not in refusal(f"Bearer {prefix}_{number}_{secret}0", "invalid_key")


def test_new_and_revoked_keys_take_effect_within_five_seconds_without_a_restart(
    service: Service,
) -> None:
    added = service.add_key("eve", "sales")
    eventually("the new key works", lambda: status(service, added["key"]) == 200, 5)
    result = service.cli("keys", "revoke", added["id"], "--keys-file", str(service.folder / "keys.json"))
    assert result.returncode == 0
    eventually("the revoked key is rejected", lambda: status(service, added["key"]) == 401, 5)
    with service.client(added["key"]) as client:
        assert added["id"] in error(client.get("/v1/models"), 401, "revoked_key")["message"]
    assert status(service, service.key) == 200


def test_a_key_is_valid_as_soon_as_it_is_created(tmp_path: Path) -> None:
    table = KeyTable(tmp_path / "keys.json", PEPPER)
    key, record = new_key(PEPPER, "s@t", "t", ["user"], None)
    with edited(table.path) as records:
        records.append(record)
    assert table.holder(key).id == record.id


def test_revoking_a_key_ends_its_running_streams_and_no_others(tmp_path: Path) -> None:
    models = {"echo": {"driver": "echo", "token_seconds": 0.05}}
    with running(tmp_path, models) as service:
        added = service.add_key("eve", "sales")
        eventually("the new key works", lambda: status(service, added["key"]) == 200, 5)
        with service.client(added["key"]) as eve, service.client() as ada:
            chat, body = "/v1/chat/completions", LASTING
            with eve.stream("POST", chat, json=body) as first, ada.stream("POST", chat, json=body) as second:
                service.cli("keys", "revoke", added["id"], "--keys-file", str(tmp_path / "keys.json"))
                lines = list(lines_of(first))
                assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "revoked_key"
                others = lines_of(second)
                # Two seconds of this stream are from after the end of the other.
                for _ in range(len(lines) + 40):
                    assert "choices" in json.loads(next(others).removeprefix("data: "))


def test_a_key_expires(service: Service) -> None:
    for seconds in 2, 8, 32, 128:  # on a busy machine it may have expired before its first use
        with edited(service.folder / "keys.json") as records:
            key, record = new_key(PEPPER, "old", "research", ["analyst"], timedelta(seconds=seconds))
            records.append(record)
        if worked := status(service, key) == 200:
            break
    assert worked
    assert record.expires
    time.sleep(max(0.0, (record.expires - datetime.now(UTC)).total_seconds()))
    eventually("it has expired", lambda: status(service, key) == 401, 5)
    with service.client(key) as client:
        error(client.get("/v1/models"), 401, "expired_key")


def test_an_unreadable_keys_file_rejects_every_key_and_fails_readiness(service: Service) -> None:
    file = service.folder / "keys.json"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    eventually("every key is rejected", lambda: status(service, service.key) == 503, 5)
    with service.client() as client:
        error(client.get("/v1/models"), 503, "keys_unreadable")
        assert "keys" in error(client.get("/readyz"), 503, "not_ready")["message"]
    file.write_bytes(good)
    eventually("the keys work again", lambda: status(service, service.key) == 200, 5)
    file.unlink()
    eventually("it is not taken for an empty one", lambda: status(service, service.key) == 503, 5)
    assert not ready(service)
    file.write_bytes(good)
    eventually("the key works again", lambda: status(service, service.key) == 200, 5)


def test_a_keys_file_that_is_moved_away_revives_no_revoked_token_after_a_restart_either(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys.json"
    assert KeyTable(path, PEPPER).records == {}, "there was none yet"
    with edited_file(path) as content:
        end_subject(content, "eve@corp")
    assert KeyTable(path, PEPPER).blocked.keys() == {"eve@corp"}
    path.rename(tmp_path / "aside")
    assert KeyTable(path, PEPPER).records is None
    with pytest.raises(KeyFileError, match="existed and is gone"), edited(path):
        pass
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to a service")
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_root_edits_no_file_that_a_link_in_the_gateways_directory_names(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:secret")
    secret.chmod(0o600)
    (tmp_path / "gateway").mkdir()
    os.chown(tmp_path / "gateway", 65534, 65534)
    path = tmp_path / "gateway/keys.json"
    path.symlink_to(secret) if kind == "link" else os.mkfifo(path)
    with pytest.raises(KeyFileError, match="cannot use the keys file"), edited(path):
        pass
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("root:secret", 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to a service")
def test_a_gateway_that_swaps_files_while_root_edits_gets_no_other_file(tmp_path: Path) -> None:
    """The temporary file, once it is written, is the gateway's to rename: root must set its owner and mode by descriptor."""
    secret = tmp_path / "shadow"
    secret.write_text("root:secret")
    secret.chmod(0o600)
    folder = tmp_path / "gateway"
    folder.mkdir()
    path = folder / "keys.json"
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for each in folder.glob(".keys.json.*"):
                with suppress(OSError):
                    (folder / "link").symlink_to(secret)
                    (folder / "link").rename(each)

    attacker = threading.Thread(target=swap)
    attacker.start()
    for _ in range(50):
        with suppress(KeyFileError, OSError), edited(path) as records:
            records.append(new_key(PEPPER, "ada", "t", ["r"], None)[1])
        path.unlink(missing_ok=True)
    stop.set()
    attacker.join()
    status = secret.stat()
    assert (secret.read_text(), status.st_mode & 0o777, status.st_uid) == ("root:secret", 0o600, 0)


def test_the_cli_prints_a_secret_once_and_stores_only_its_hash(echo: Service, tmp_path: Path) -> None:
    file = ["--keys-file", str(tmp_path / "keys.json")]
    who = [
        "--subject",
        "bob",
        "--tenant",
        "sales",
        "--role",
        "analyst",
        "--role",
        "rater",
        "--expires",
        "90d",
    ]
    added = echo.cli("keys", "add", *who, *file)
    key = added.stdout.strip()
    prefix, number, secret = key.split("_")
    assert prefix == "llmk"
    assert secret not in added.stderr
    assert number in added.stderr
    content = (tmp_path / "keys.json").read_text()
    assert secret not in content
    record = json.loads(content)["keys"][0]
    assert set(record) >= {"id", "hash", "subject", "tenant", "roles", "expires"}
    assert record["roles"] == ["analyst", "rater"]
    left = datetime.fromisoformat(record["expires"]) - datetime.now(UTC)
    assert timedelta(days=89, hours=23) < left <= timedelta(days=90)
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o640
    listed = echo.cli("keys", "list", *file)
    assert "bob" in listed.stdout
    assert secret not in listed.stdout + listed.stderr
    [entry] = json.loads(echo.cli("keys", "list", "--json", *file).stdout)
    assert (entry["subject"], entry["state"]) == ("bob", "live")
    assert "hash" not in entry
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keys.json.existed", "keys.json"]


def test_the_cli_refuses_with_a_reason_and_changes_nothing(echo: Service, tmp_path: Path) -> None:
    file = ["--keys-file", str(tmp_path / "keys.json")]
    unknown = echo.cli("keys", "revoke", "0123", *file)
    assert unknown.returncode == 3
    assert "'0123'" in unknown.stderr
    who = ["--subject", "bob", "--tenant", "sales", "--role", "analyst"]
    assert echo.cli("keys", "add", *who, "--expires", "soon", *file).returncode == 2
    short = tmp_path / "pepper"
    short.write_bytes(b"short")
    refused = echo.cli("keys", "add", *who, "--pepper-file", str(short), *file)
    assert refused.returncode == 1
    assert "5 bytes" in refused.stderr
    (tmp_path / "keys.json").write_text("{}x")
    broken = echo.cli("keys", "add", *who, *file)
    assert broken.returncode == 1
    assert "keys.json" in broken.stderr
    assert (tmp_path / "keys.json").read_text() == "{}x"


def test_a_rotated_key_expires_after_the_overlap_with_its_successor(service: Service) -> None:
    old = service.add_key("mia", "sales", "--expires", "90d")
    file = ["--keys-file", str(service.folder / "keys.json")]
    result = service.cli("keys", "rotate", old["id"], "--overlap", "12h", "--json", *file)
    new = json.loads(result.stdout)
    assert old["key"] not in result.stdout
    assert (new["subject"], new["tenant"], new["roles"]) == ("mia", "sales", ["developer"])
    assert new["replaces"] == old["id"]
    assert datetime.fromisoformat(new["expires"]) - datetime.fromisoformat(new["created"]) == timedelta(
        days=90
    )
    eventually("the new key works", lambda: status(service, new["key"]) == 200, 5)
    assert status(service, old["key"]) == 200
    [left] = [record for record in read_keys(service.folder / "keys.json").keys if record.id == old["id"]]
    assert left.expires
    assert timedelta(hours=11, minutes=59) < left.expires - datetime.now(UTC) <= timedelta(hours=12)
    with edited(service.folder / "keys.json") as records:
        index = records.index(left)
        records[index] = left.model_copy(update={"expires": datetime.now(UTC)})  # twelve hours later
    eventually("the old key has expired", lambda: status(service, old["key"]) == 401, 5)
    assert status(service, new["key"]) == 200


def test_a_revoked_rotated_or_unknown_key_is_not_rotated(service: Service) -> None:
    def refusal(number: str, code: int) -> str:
        file = ["--keys-file", str(service.folder / "keys.json")]
        result = service.cli("keys", "rotate", number, *file)
        assert (result.returncode, result.stdout) == (code, "")
        return result.stderr

    file = ["--keys-file", str(service.folder / "keys.json")]
    dead, old = service.add_key("dan"), service.add_key("olga")
    service.cli("keys", "revoke", dead["id"], *file)
    new = json.loads(service.cli("keys", "rotate", old["id"], "--json", *file).stdout)
    assert "was revoked" in refusal(dead["id"], 1)
    assert new["id"] in refusal(old["id"], 1)
    assert "'0123'" in refusal("0123", 3)


def test_a_key_of_one_host_is_imported_by_another_with_its_own_pepper(tmp_path: Path) -> None:
    hosts = {}
    for name in "one", "two":
        (tmp_path / name).mkdir()
        (tmp_path / name / "pepper").write_bytes(name.encode() * 16)
        hosts[name] = ["--keys-file", str(tmp_path / name / "keys.json"), "--json"]
        hosts[name] += ["--pepper-file", str(tmp_path / name / "pepper")]

    def cli(given: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmserve", "keys", *words]
        return subprocess.run(command, input=given, capture_output=True, text=True, check=False)

    def records(name: str) -> dict[str, Record]:
        return {record.id: record for record in read_keys(tmp_path / name / "keys.json").keys}

    who = ["--subject", "bob", "--tenant", "t", "--role", "r", "--expires", "30d"]
    added = cli("", "add", *who, *hosts["one"]).stdout
    old, secret = json.loads(added)["id"], json.loads(added)["key"]
    for taken in True, False:
        imported = cli(added, "import", *hosts["two"])
        assert json.loads(imported.stdout)["imported"] is taken
        assert secret.split("_")[2] not in imported.stdout + imported.stderr
    both = [records(name)[old] for name in hosts]
    assert both[0].hash != both[1].hash, "each host has a pepper of its own"
    assert both[0].model_copy(update={"hash": ""}) == both[1].model_copy(update={"hash": ""})
    assert KeyTable(tmp_path / "two" / "keys.json", b"two" * 16).holder(secret).subject == "bob"

    rotated = cli("", "rotate", old, "--overlap", "1h", *hosts["one"]).stdout
    cli(rotated, "import", *hosts["two"])
    assert records("one")[old].expires == records("two")[old].expires != both[0].expires
    assert set(records("one")) == set(records("two"))

    cli("", "revoke", old, *hosts["two"][:3])
    assert json.loads(cli(added, "import", *hosts["two"]).stdout)["state"] == "revoked"
    assert records("two")[old].revoked, "the revocation is not undone"
    forged = json.dumps({**json.loads(added), "key": f"llmk_{old}_{'0' * 48}"})
    assert "another key" in cli(forged, "import", *hosts["two"]).stderr
    for wrong in "", "[]", "{}", '{"id": 5}', json.dumps({**json.loads(added), "id": "other"}), added + "x":
        refused = cli(wrong, "import", *hosts["two"])
        assert (refused.returncode, "standard input" in refused.stderr) == (1, True)
        assert secret not in refused.stderr


def test_revoking_a_subject_ends_all_its_keys_and_no_others(service: Service) -> None:
    keys = [service.add_key("max", tenant)["key"] for tenant in ("sales", "research")]
    other = service.add_key("max2", "sales")["key"]
    eventually("they work", lambda: {status(service, key) for key in [*keys, other]} == {200}, 5)
    file = ["--keys-file", str(service.folder / "keys.json")]
    result = service.cli("keys", "revoke", "--subject", "max", "--json", *file)
    assert set(json.loads(result.stdout)["revoked"]) == {key.split("_")[1] for key in keys}
    eventually("both are rejected", lambda: {status(service, key) for key in keys} == {401}, 5)
    assert status(service, other) == 200
    assert [each.subject for each in read_keys(service.folder / "keys.json").blocked] == ["max"]


def test_the_list_shows_the_minute_in_which_a_key_was_last_used(tmp_path: Path) -> None:
    def last_used(service: Service) -> dict[str, str | None]:
        listed = service.cli("keys", "list", "--json", "--keys-file", str(tmp_path / "keys.json")).stdout
        return {entry["id"]: entry["last_used"] for entry in json.loads(listed)}

    with running(tmp_path) as service:
        idle, first, second = (service.add_key(name)["id"] for name in ("idle", "first", "second"))
        used, later = service.add_key("used"), service.add_key("later")
        eventually("it works", lambda: status(service, used["key"]) == 200, 5)
        shown = eventually("it is shown", lambda: last_used(service)[used["id"]], 5)
        assert datetime.now(UTC) - datetime.fromisoformat(shown) < timedelta(minutes=2)
        assert datetime.fromisoformat(shown).second == 0
        wrote = (tmp_path / "last-used.json").stat().st_mtime_ns
        assert status(service, later["key"]) == 200
        with service.client(used["key"]) as client:
            # Each is a use; none waits for the audit record's disk until the minute has passed.
            for _ in range(50):
                assert client.get("/nothing").status_code == 404
        assert (tmp_path / "last-used.json").stat().st_mtime_ns == wrote, "at most one write a minute"
    assert stat.S_IMODE((tmp_path / "last-used.json").stat().st_mode) == 0o600
    shown_all = last_used(service)
    assert shown_all[later["id"]], "written when the gateway stops"
    assert {shown_all[number] for number in (idle, first, second)} == {None}


def test_gateways_that_share_the_last_used_file_keep_the_later_time(tmp_path: Path) -> None:
    path = tmp_path / "last-used.json"
    path.write_text(json.dumps({"both": "2026-01-01T00:00Z", "gone": "2026-01-01T00:00Z"}))
    one, other = LastUsed(path), LastUsed(path)
    one.touch("of one")
    one.touch("both")
    one.flush({"of one", "both", "of the other"})
    other.touch("of the other")
    other.flush({"of one", "both", "of the other"})
    minutes = read_last_used(path)
    assert minutes.keys() == {"of one", "both", "of the other"}
    assert min(minutes.values()) > datetime(2026, 1, 2, tzinfo=UTC)


def test_a_flood_of_wrong_keys_reads_no_file_and_compares_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edited(tmp_path / "keys.json") as records:
        key, record = new_key(PEPPER, "s@t", "t", ["user"], None)
        records += [record.model_copy(update={"id": f"{number:012x}"}) for number in range(5000)]
    table = KeyTable(tmp_path / "keys.json", PEPPER)
    compared: list[tuple[str, str]] = []
    constant_time = hmac.compare_digest

    def watched(one: str, other: str) -> bool:
        compared.append((one, other))
        return constant_time(one, other)

    monkeypatch.setattr("llmserve.access.api_keys.hmac.compare_digest", watched)
    started = time.process_time()
    for number in range(5000):
        wrong = f"llmk_{number:012x}_{key[18:]}" if number % 2 else f"llmk_unknown{number}_{key[18:]}"
        with pytest.raises(ApiError, match="invalid_key"):
            table.holder(wrong)
    spent = time.process_time() - started
    assert len(compared) == 5000, "an unknown id costs the same comparison as a wrong secret"
    assert {len(digest) for both in compared for digest in both} == {64}
    assert spent < 1, "reading this file 5000 times would take minutes"


def test_concurrent_edits_lose_no_key(tmp_path: Path) -> None:
    def add(number: int) -> None:
        with edited(tmp_path / "keys.json") as records:
            records.append(new_key(PEPPER, f"user{number}", "t", ["r"], None)[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert len(read_keys(tmp_path / "keys.json").keys) == 40
