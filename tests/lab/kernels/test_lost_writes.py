"""A power cut that loses what the disk had not flushed: lost_writes.py says how, on a host that has device-mapper."""

import os
from pathlib import Path

import pytest
from estate import ROOT, Lab
from luks_estate import Estate

pytestmark = pytest.mark.leaves_it_whole
SEED = os.environ.get("SEED", "5")
# `make storm` plays every cut, a run of the suite one of each so many equal stretches of the log.
CUTS = "0" if "STORM" in os.environ else "3"
PROGRAM = "tests/lab/kernels/lost_writes.py"
PARTS = (
    "plugins/module_utils", "tests/helpers/plugin_modules.py", "tests/helpers/luks_estate.py",
    "tests/lab/kernels/write_log.py", PROGRAM,
)  # fmt: skip
PLACE = "/root/lost-writes"


def test_after_lost_writes_a_plain_run_converges_and_no_key_and_no_data_is_gone(
    estate: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Estate(tmp_path / "estate")
    made.root.mkdir()
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.conf))
    made.make()
    for token in ("main", "spare"):
        made.new_key(token, "host1-v2")
    parts = {f"estate/{name}": made.root / name for name in ("tokens", "control", "escrow.pem", "escrow.key")}
    estate.send("llm1", PLACE, {part: ROOT / part for part in PARTS} | parts)
    estate.on("llm1", "apt-get -qq install -y --no-install-recommends softhsm2 > /dev/null")
    # SoftHSM is this test's HSM and no other program's: the host enables the module of its own HSM alone.
    inside = f"mkdir -p /etc/pkcs11/modules && mount -t tmpfs none /etc/pkcs11/modules && exec python3 {PLACE}/{PROGRAM}"
    try:
        said = estate.run(
            "exec", "llm1", "--", "unshare", "--mount", "sh", "-c", f"{inside} {PLACE}/estate {CUTS} {SEED}",
            check=False, timeout=600 if CUTS != "0" else 6 * 3600,
        )  # fmt: skip
    finally:
        estate.on(
            "llm1", f"apt-get -qq purge -y softhsm2 softhsm2-common libsofthsm2 > /dev/null; rm -rf {PLACE}"
        )
    print(said.stdout)
    assert said.returncode == 0, said.stdout[-6000:] + said.stderr[-3000:]
    # A person is allowed, but none is known.
    assert " 0 for a person, 0 failed" in said.stdout, said.stdout[-6000:]
