"""The operator's verbs for encrypted volumes, on a real estate: a new disk, new keys, erasure, drill, new PIN. They come in this
order."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from estate import Client, Lab, answers, drill

STORE = "/var/lib/llmkeep/storage"
DEAD, EXTRA = "EXTRA-1", "EXTRA-2"  # serials of disks that are files
DISK = f"/root/{EXTRA}"
NEW_LABEL = "llm1-2"
VOLUMES = ("data", "audit")


def verb(estate: Lab, playbook: str, *words: str, **variables: Any) -> str:
    """`llmkeep run`, with what the operator wrote into the inventory."""
    given = [f"-e '{json.dumps(variables)}'"] if variables else []
    return estate.operate(f"run playbooks/{playbook}", "-i /root/verbs.json", *words, *given)


def inventory(estate: Lab, **variables: Any) -> None:
    """What an operator changes of llm1."""
    text = json.dumps({"storage": {"hosts": {"llm1": variables}}})
    estate.on("ops1", f"echo '{text}' > /root/verbs.json")


def volumes(estate: Lab) -> dict[str, dict[str, Any]]:
    told = json.loads(estate.on("llm1", "llmkeep-volumes status"))["volumes"]
    return {volume["volume"]: volume for volume in told}


def kept(estate: Lab, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(estate.on("ops1", f"cat {STORE}/{name}.json"))
    return found


def volume_on(estate: Lab, name: str) -> str:
    """A small volume on a new disk, which is a file of llm1; the UUID of what is there after a run."""
    loop = estate.on("llm1", f"truncate -s 64M /root/{name} && losetup --find --show /root/{name}").strip()
    every = json.loads(estate.on("llm1", "cat /etc/llmkeep/volumes.json"))["volumes"]
    others = [volume for volume in every if volume["name"] != "extra"]
    inventory(
        estate,
        luks_volumes=[
            *others,
            {"name": "extra", "serial": name, "device": loop, "size": "32M", "mount": "/srv/extra"},
        ],
    )
    if name != DEAD:
        estate.operate("disk replace", "-i /root/verbs.json", f"llm1 extra {name} --reason dead")
    verb(estate, "storage.yml", "--limit llm1 --tags luks")
    return str(kept(estate, "llm1-extra")["uuid"])


@pytest.fixture(scope="module")
def replaced(estate: Lab) -> tuple[str, str]:
    """UUIDs of a volume on a disk that died, and of the one on the disk that came in its place."""
    before = volume_on(estate, DEAD)
    estate.on("llm1", f"echo precious > /srv/extra/data && sync && truncate -s 0 /root/{DEAD}")
    return before, volume_on(estate, EXTRA)


@pytest.fixture(scope="module")
def extra(estate: Lab, replaced: tuple[str, str]) -> Iterator[str]:
    """The UUID of a small volume that will be erased. It lies in a file of llm1, whose header somebody copied."""
    estate.on("llm1", f"echo precious > /srv/extra/data && head -c 16M {DISK} > /root/old-header")
    yield replaced[1]
    detach = f"losetup --detach $(losetup --noheadings --output NAME --associated {DISK})"
    estate.on(
        "llm1", f"{detach}; chattr -i /srv/extra; rm -rf {DISK} /root/{DEAD} /root/old-header /srv/extra"
    )
    inventory(estate, hsm_key_label=NEW_LABEL)


def test_a_volume_whose_disk_died_is_made_anew_on_another_one(estate: Lab, replaced: tuple[str, str]) -> None:
    before, after = replaced
    assert before != after
    assert estate.on("llm1", "mountpoint /srv/extra && ls /srv/extra").split()[-1] == "lost+found"
    assert volumes(estate)["extra"]["problems"] == []
    assert before in estate.on("ops1", "cat /var/lib/llmkeep/replaced/llm1-*/storage/llm1-extra.json")


@pytest.mark.usefixtures("extra")
def test_new_keys_are_enrolled_in_every_volume_and_the_old_ones_open_nothing(
    estate: Lab, client: Client
) -> None:
    before, escrowed = volumes(estate), {name: kept(estate, f"llm1-{name}") for name in VOLUMES}
    inventory(estate, hsm_key_label=NEW_LABEL)  # and without the volume that goes
    verb(estate, "rotate-keys.yml", rotate_hsm_key=True)
    after = volumes(estate)
    assert set(after) == set(VOLUMES)
    for name, volume in after.items():
        assert volume["problems"] == []
        assert sorted(slot["owner"] for slot in volume["slots"]) == ["hsm", "recovery", "spare"]
        enrolled = {slot["owner"]: slot["enrolled"] for slot in before[name]["slots"]}
        assert all(slot["enrolled"] > enrolled[slot["owner"]] for slot in volume["slots"])
        uris = estate.on("llm1", f"cryptsetup luksDump /dev/disk/by-uuid/{volume['uuid']} | grep pkcs11-uri")
        assert uris.count(f"object={NEW_LABEL};") == 2
        assert "object=llm1;" not in uris
        for kind in ("recovery_stored", "header_stored"):
            assert kept(estate, f"llm1-{name}")[kind] > escrowed[name][kind]
    assert "Paris" in answers(client, 180)


def test_an_erased_volume_opens_by_no_key_that_ever_opened_it_and_the_others_still_do(
    estate: Lab, extra: str, client: Client
) -> None:
    verb(estate, "erase.yml", volume="llm1/extra", uuid=extra)
    certificate = kept(estate, f"erased/llm1-extra.{extra}")
    assert certificate["hsm_keys_destroyed"] == ["llm1"]
    assert certificate["header_opened_by_no_token"] is True
    assert len(certificate["escrow_destroyed_sha256"]) == 2
    assert "llm1-extra" not in estate.on("ops1", f"ls {STORE}")
    assert estate.on("llm1", f"head -c 16M {DISK} | tr -d '\\0' | wc -c").strip() == "0"
    # The header that somebody copied, brought back.
    opens = f"""dd if=/root/old-header of={DISK} conv=notrunc status=none
    systemd-creds decrypt --name=cryptsetup.pkcs11-pin /etc/credstore.encrypted/cryptsetup.pkcs11-pin - |
    cryptsetup open --test-passphrase --token-only --verbose {DISK} 2>&1 && echo OPENED"""
    assert "OPENED" not in estate.on("llm1", opens, check=False)
    assert json.loads(estate.on("llm1", "llmkeep-hsm"))["opens"] == ["llmkeep", "llmkeep-spare"]
    assert "Paris" in answers(client, 180)


def test_the_drill_opens_what_is_kept_and_the_register_has_the_day(estate: Lab) -> None:
    today = "date --utc +%F"
    days = [estate.on("ops1", today).strip()]
    drill(estate, "llm1/audit")
    days.append(estate.on("ops1", today).strip())  # midnight may come between
    assert kept(estate, "llm1-audit")["drilled"][:10] in days


def test_the_pin_is_changed_in_both_tokens_and_on_each_host(estate: Lab) -> None:
    sealed = "sha256sum /etc/credstore.encrypted/cryptsetup.pkcs11-pin /etc/credstore.encrypted/cryptsetup.luks2-pin"
    before = estate.on("llm1", sealed).split()[::2]
    said = verb(estate, "rotate-pin.yml")
    after = estate.on("llm1", sealed).split()[::2]
    assert not set(before) & set(after)
    assert json.loads(estate.on("llm1", "llmkeep-hsm"))["opens"] == ["llmkeep", "llmkeep-spare"]
    assert estate.on("ops1", "ls -d /var/lib/llmkeep/hsm-pin*; true") == ""
    assert volumes(estate)["data"]["problems"] == []
    pin = estate.on("ops1", "systemd-creds decrypt /etc/credstore.encrypted/llmkeep.hsm-pin -")
    assert len(pin) == 32
    assert pin not in said
    assert pin not in estate.on("ops1", "journalctl --boot --output=cat")
