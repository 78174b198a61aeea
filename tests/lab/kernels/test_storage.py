"""Encrypted volumes on real disks: a host that boots with the HSM, without it, and with a wrong PIN."""

import json
import re

import pytest
from estate import Client, Lab, answers, within

pytestmark = pytest.mark.leaves_it_whole
MOUNTS = ("/srv/llmkeep", "/var/log/llm-audit")
HSM = "softhsm-tls.service softhsm-server.service"
PIN = "/etc/credstore.encrypted/cryptsetup.pkcs11-pin"
BOOT_PIN = "/etc/credstore.encrypted/cryptsetup.luks2-pin"
OPEN_SECONDS = 60
RETRY_SECONDS = 90  # asked again each 15 s, one volume after the other


def mounted(estate: Lab) -> list[str]:
    """What is mounted of the volumes."""
    shown = estate.on(
        "llm1", f"for at in {' '.join(MOUNTS)}; do findmnt -no TARGET --mountpoint $at; done; true"
    )
    return shown.split()


def boot(estate: Lab) -> None:
    estate.run("power-off", "llm1")
    estate.run("power-on", "llm1")


def test_an_auditor_sees_each_volume_with_its_slots_and_owners(estate: Lab) -> None:
    within(OPEN_SECONDS, "all are mounted", lambda: len(mounted(estate)) == len(MOUNTS))
    told = json.loads(estate.on("llm1", "llmkeep-volumes status"))["volumes"]
    assert {volume["mount"] for volume in told} == set(MOUNTS)
    for volume in told:
        assert volume["problems"] == []
        assert (volume["cipher"], volume["key_bits"]) == (["aes-xts-plain64"], [512])
        assert sorted(slot["owner"] for slot in volume["slots"]) == ["hsm", "recovery", "spare"]
    kept = estate.on("ops1", "ls /var/lib/llmkeep/storage").split()
    assert {f"llm1-{name}.{kind}" for name in ("data", "audit") for kind in ("json", "recovery.cms", "header.cms")} == set(
        kept
    )  # fmt: skip


def test_after_a_power_cut_all_volumes_open_unattended_and_the_service_answers(
    estate: Lab, client: Client
) -> None:
    key = "dmsetup table --showkeys llm_swap | cut -d ' ' -f 5 | sha256sum"
    before = estate.on("llm1", key)
    boot(estate)
    within(OPEN_SECONDS, "both volumes are mounted", lambda: len(mounted(estate)) == len(MOUNTS))
    within(OPEN_SECONDS, "it is swapped to again", lambda: "/dm-" in estate.on("llm1", "cat /proc/swaps"))
    assert estate.on("llm1", key) != before
    opened = estate.on(
        "llm1", "systemctl show --property=ActiveEnterTimestampMonotonic --value srv-llmkeep.mount"
    )
    assert int(opened) / 1e6 < OPEN_SECONDS
    assert "Paris" in answers(client, 180)


def test_without_the_hsm_the_host_boots_writes_nothing_in_clear_and_starts_by_itself_when_it_is_back(
    estate: Lab, client: Client
) -> None:
    estate.on("ops1", f"systemctl stop {HSM}")
    try:
        boot(estate)  # until SSH answers
        asked = "journalctl --boot --unit 'systemd-cryptsetup@llm_*' --output=cat"
        # Each volume twice: when the host boots, and once more by itself.
        asks = len(MOUNTS) * 2
        within(240, "the HSM is asked", lambda: estate.on("llm1", asked).count('"fault": "absent"') >= asks)
        assert mounted(estate) == []
        assert estate.on(
            "llm1", "systemctl is-active llm-gateway@1.service llm-audit.service", check=False
        ).split() == [
            "inactive",
            "inactive",
        ]
        assert estate.on("llm1", f"find {' '.join(MOUNTS)} -mindepth 1") == ""
        estate.on(
            "llm1", f"for at in {' '.join(MOUNTS)}; do touch $at/clear 2> /dev/null && exit 1; done; true"
        )
    finally:
        estate.on("ops1", f"systemctl start {HSM}")
    within(RETRY_SECONDS, "both volumes are mounted", lambda: len(mounted(estate)) == len(MOUNTS))
    assert "Paris" in answers(client, 180)


def test_a_wrong_pin_is_shown_once_and_not_again(estate: Lab, client: Client) -> None:
    estate.on("llm1", f"cp -a {PIN} /root/pin && cp -a {BOOT_PIN} /root/boot-pin")
    for path in (PIN, BOOT_PIN):
        estate.on("llm1", f"printf 000000 | systemd-creds encrypt --name={path.rsplit('/', 1)[1]} - {path}")
    estate.on("llm1", "sync")  # what comes is a power cut
    journal = "journalctl --boot --unit 'systemd-cryptsetup@llm_*' --output=cat"
    try:
        boot(estate)
        held_back = "before. It is not tried again until another one is sealed"
        within(240, "it is held back", lambda: held_back in estate.on("llm1", journal))
        for _ in range(3):  # as they are each 15 s
            for name in ("data", "audit"):
                estate.on("llm1", f"systemctl restart systemd-cryptsetup@llm_{name}", check=False)
        assert estate.on("llm1", journal).count(held_back) > 6
        assert estate.on("llm1", journal).count("It was tried once") == 1
        assert mounted(estate) == []
    finally:
        estate.on(
            "llm1",
            f"cp -a /root/pin {PIN} && cp -a /root/boot-pin {BOOT_PIN} && rm /root/pin /root/boot-pin && sync",
        )
    within(RETRY_SECONDS, "both volumes are mounted", lambda: len(mounted(estate)) == len(MOUNTS))
    assert "Paris" in answers(client, 180)


DUST = """modprobe dm-dust && dmsetup create dusty --table '0 131072 dust {loop} 0 512' &&
dmsetup message dusty 0 addbadblock 90000 && dmsetup message dusty 0 enable"""
HOSTILE = {
    "unreadable": (
        DUST,
        "/dev/mapper/dusty",
        "dmsetup remove dusty",
        f"cannot be read at byte {90000 * 512}: Input/output error",
    ),
    "held": (
        "dmsetup create holder --table '0 131072 linear {loop} 0'",
        "{loop}",
        "dmsetup remove holder",
        "is held by dm-",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_disk_that_only_a_kernel_with_device_mapper_can_make_is_refused_untouched(
    estate: Lab, kind: str
) -> None:
    make, device, unmake, reason = HOSTILE[kind]
    loop = estate.on("llm1", "truncate -s 64M /root/HOSTILE && losetup --find --show /root/HOSTILE").strip()
    estate.on("llm1", make.format(loop=loop))
    try:
        volume = {"name": "hostile", "serial": "HOSTILE", "size": "1M", "mount": "/srv/hostile"}
        volume["device"] = device.format(loop=loop)
        given = json.dumps({"luks_volumes": [volume]})
        said = estate.run("site", "--limit", "llm1", "--tags", "luks", "-e", given, check=False).stdout
        assert re.search(reason, said), said[-3000:]
        assert estate.on("llm1", "tr -d '\\0' < /root/HOSTILE | wc -c").strip() == "0"
    finally:
        estate.on("llm1", f"{unmake} && losetup --detach {loop} && rm /root/HOSTILE")
