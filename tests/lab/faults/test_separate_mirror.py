"""An estate whose mirror is not the control node: it copies from there, and all other hosts ask the mirror alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trained_candidate
from estate import BUNDLE, ROOT, Lab, changed, sign_and_add, sign_as_builder

from llmkeep.bundle import manifest

INVENTORY = Path(__file__).with_name("separate_mirror")
ON_OPS1 = f"-i /root/lab/{INVENTORY.relative_to(ROOT)}"  # where `lab demo` puts it
MEDIUM = "cp -r /media/llmkeep /root/medium && cp /root/manifest/* /root/medium/ && sh /root/medium/bootstrap"
SERVING = "cd /srv/llmkeep && readlink bundle/current && ls releases"
# Exit code of bash, or of timeout where no packet comes back.
CONNECT = "timeout 5 bash -c '</dev/tcp/{}/8443' 2> /dev/null; echo $?"


@pytest.fixture
def apart() -> Iterator[Lab]:
    """A lab of its own, thrown away afterwards."""
    lab = Lab("separate-mirror")
    yield lab
    lab.run("destroy")


def newer(folder: Path) -> Path:
    """A folder with manifest and signature of the suite's bundle, of the next serial."""
    folder.mkdir()
    bundle = manifest.read(BUNDLE)
    bundle.serial += 1
    sign_as_builder(bundle, folder)
    return folder


def outcome(lab: Lab, command: str) -> tuple[str, str]:
    """What an operator's command on the control node prints, on one line, and its exit code."""
    words = lab.on("ops1", f"llmkeep {command} {ON_OPS1} 2>&1; echo $?", timeout=900)
    printed, _, code = words.rstrip().rpartition("\n")
    return printed, code


def test_hosts_get_everything_from_a_mirror_that_copies_from_the_control_node(
    apart: Lab, tmp_path: Path
) -> None:
    output = apart.run("--inventory", str(INVENTORY), "demo", timeout=2400).stdout
    assert "Paris" in output
    assert changed(apart.run("site", timeout=900).stdout) == {"ops1": 0, "depot1": 0, "llm1": 0}

    assert "depot1.estate.internal:8443_apt_" in apart.on("llm1", "ls /var/lib/apt/lists")
    assert "ops1.estate.internal" not in apart.on(
        "llm1", "ls /var/lib/apt/lists; cat /etc/apt/sources.list.d/*"
    )
    # 124: the packets are dropped.
    assert apart.on("llm1", CONNECT.format("ops1")) == "124\n"
    assert apart.on("llm1", CONNECT.format("depot1")) == "0\n"
    # Not by llm1's firewall alone.
    let_in = apart.on("ops1", "nft list chain inet llmkeep input")
    assert "10.88.4.12 tcp dport 8443 accept" in let_in
    assert "10.88.4.13 tcp dport 8443" not in let_in

    serial = manifest.read(BUNDLE).serial
    candidate = trained_candidate.candidate(tmp_path / "candidate")
    apart.send("ops1", "/root", {"manifest": newer(tmp_path / "manifest"), "candidate": candidate})
    apart.on("ops1", MEDIUM)
    sign_and_add(apart, "/root/candidate")
    printed, code = outcome(apart, "site --tags llm_serving")
    assert code != "0"
    lacking = f"bundle {serial + 1} (it has {serial}), releases/{trained_candidate.NAME}"
    sentence = f"The mirror depot1 lacks {lacking}, which the control node ops1 has."
    assert sentence in " ".join(printed.split())
    assert "llm1" not in changed(printed)

    printed, code = outcome(apart, "site --limit control:mirror")
    assert code == "0", printed[-3000:]
    assert "llm1" not in changed(printed)
    assert apart.on("depot1", SERVING) == f"{serial + 1}\n{trained_candidate.NAME}\n"
    printed, code = outcome(apart, "site --tags llm_serving")
    assert code == "0", printed[-3000:]
