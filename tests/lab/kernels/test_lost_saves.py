"""A power cut that loses what the disk had not flushed, while checkpoints are saved: lost_saves.py says how, on a lab host."""

import os

import pytest
from estate import ROOT, Lab

pytestmark = pytest.mark.leaves_it_whole
SEED = os.environ.get("SEED", "5")
# `make storm` plays every cut, a run of the suite one of each so many equal stretches of the log.
CUTS = "0" if "STORM" in os.environ else "6"
PROGRAM = "tests/lab/kernels/lost_saves.py"
PARTS = (
    "llmcore/__init__.py", "llmcore/files.py", "payload/llmtrain/__init__.py", "payload/llmtrain/exits.py",
    "payload/llmtrain/run/__init__.py", "payload/llmtrain/run/sealed.py", "payload/llmtrain/run/checkpoint.py",
    "payload/llmtrain/run/collectives.py",
    "payload/tests/helpers/saver.py", "tests/lab/kernels/write_log.py", PROGRAM,
)  # fmt: skip
PLACE = "/root/lost-saves"


def test_after_lost_writes_the_last_checkpoint_that_was_saved_is_found_whole(estate: Lab) -> None:
    estate.send("llm1", PLACE, {part: ROOT / part for part in PARTS})
    try:
        said = estate.run(
            "exec", "llm1", "--", "python3", f"{PLACE}/{PROGRAM}", f"{PLACE}/work", CUTS, SEED,
            check=False, timeout=600 if CUTS != "0" else 6 * 3600,
        )  # fmt: skip
    finally:
        estate.on("llm1", f"rm -rf {PLACE}")
    print(said.stdout)
    assert said.returncode == 0, said.stdout[-6000:] + said.stderr[-3000:]
    assert " 0 failed" in said.stdout, said.stdout[-6000:]
