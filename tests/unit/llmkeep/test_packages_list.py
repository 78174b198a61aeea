"""`llmkeep packages list`: what hosts have installed becomes a file that the builder resolves."""

import subprocess
from pathlib import Path

import pytest
import yaml

from llmkeep import packages
from llmkeep.cli import main
from llmkeep.errors import LlmkeepError

HERE = "{ansible_connection: local, ansible_python_interpreter: /usr/bin/python3}"
AWAY = "{ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}"


def inventory(folder: Path, **hosts: str) -> list[str]:
    """The command's words for an inventory of hosts."""
    path = folder / "hosts.yml"
    path.write_text(f"all: {{hosts: {{{', '.join(f'{name}: {how}' for name, how in hosts.items())}}}}}")
    return ["packages", "list", "-i", str(path), "--out", str(folder / "installed.yml")]


def test_the_file_has_the_packages_that_dpkg_calls_installed(tmp_path: Path) -> None:
    assert main(inventory(tmp_path, one=HERE, two=HERE)) == 0
    words = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\\n"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    there = sorted({line.split()[1] for line in lines if line.startswith("installed ")})
    assert yaml.safe_load((tmp_path / "installed.yml").read_text()) == {"apt": {"installed": there}}


def test_without_all_hosts_there_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(inventory(tmp_path, one=HERE, two=AWAY)) == 1
    assert "- two: List installed packages: " in capsys.readouterr().err
    assert not (tmp_path / "installed.yml").exists()


def test_a_package_that_only_some_hosts_have_is_named_with_these() -> None:
    hosts = {"gpu1": {"sudo", "on"}, "gpu2": {"sudo"}}
    assert packages.document(hosts).splitlines()[3:] == ["    - 'on'  # gpu1", "    - sudo"]


@pytest.mark.parametrize(
    "line", ["ii \t../../etc", "ii \t-o", "ii \t{{ lookup('pipe', 'id') }}", "ii  sudo", "ii \tsudo\tmore"]
)
def test_a_line_that_is_not_dpkgs_is_refused_with_its_host(line: str) -> None:
    with pytest.raises(LlmkeepError, match=r"gpu1 printed .* which is no line of dpkg's: look at it"):
        packages.names("gpu1", f"ii \tsudo\n{line}\n")


def test_a_package_on_hold_counts_and_one_that_was_removed_does_not() -> None:
    assert packages.names("gpu1", "hi \tlinux-image-amd64\nrc \tvim\nun \tnano\niiR\tsudo\n") == {
        "linux-image-amd64",
        "sudo",
    }


def test_a_host_without_a_package_is_refused() -> None:
    with pytest.raises(LlmkeepError, match="gpu1 has no package, by its dpkg: look at it"):
        packages.names("gpu1", "rc \tvim\n")
