"""What is installed on a host, and which units run it."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from called_module import called
from plugin_modules import load

software = load("module_utils.patch.software")
services = load("module_utils.patch.services")
host_software = load("modules.host_software")

SITE = "lib/python3.13/site-packages"
LIBSSL = "/usr/lib/x86_64-linux-gnu/libssl.so.3"
MAPS = """7f00-7f01 r-xp 00000000 fe:00 1234   {path}
7f02-7f03 r-xp 00000000 fe:00 1235   /usr/bin/nginx (deleted)
7f04-7f05 rw-s 00000000 00:01 1236   /memfd:pool (deleted)
"""


def process(proc: Path, number: int, unit: str, path: str, comm: str = "nginx") -> None:
    (proc / str(number)).mkdir(parents=True)
    (proc / str(number) / "comm").write_text(f"{comm}\n")
    (proc / str(number) / "maps").write_text(MAPS.format(path=path))
    (proc / str(number) / "cgroup").write_text(f"0::/system.slice/{unit}\n")


def dpkg(*lines: str) -> Callable[[list[str]], str]:
    return lambda _: "\n".join(lines) + "\n"


def test_a_packages_units_are_those_that_map_a_file_of_it(tmp_path: Path) -> None:
    process(tmp_path / "proc", 12, "nginx.service", LIBSSL)
    process(tmp_path / "proc", 13, "ssh.service", LIBSSL, comm="sshd-session")
    info = tmp_path / "info"
    info.mkdir()
    # A list of before /usr was merged.
    (info / "libssl3t64:amd64.list").write_text("/.\n/lib/x86_64-linux-gnu/libssl.so.3\n")
    (info / "gzip.list").write_text("/usr/bin/gzip\n")
    (info / "tzdata.list").write_text("/usr/share/zoneinfo/UTC\n")
    lines = ["ii \tlibssl3t64\t3.5.1-1\tamd64\topenssl\t3.5.1-1", "ii \tgzip\t1.13-1\tamd64\tgzip\t1.13-1",
             "hi \ttzdata\t2026b-0\tamd64\ttzdata\t2026b-0", "rc \tvim\t9\tamd64\tvim\t9"]  # fmt: skip
    units = software.users(services.mapped(tmp_path / "proc"))
    assert software.packages(dpkg(*lines), info, "6.12", units) == [
        ["libssl3t64", "3.5.1-1", "openssl", "3.5.1-1", ["nginx.service"]],
        ["gzip", "1.13-1", "gzip", "1.13-1", []],
        ["tzdata", "2026b-0", "tzdata", "2026b-0", None],
    ]


def test_the_kernel_that_runs_is_in_use(tmp_path: Path) -> None:
    line = "ii \tlinux-image-6.12-amd64\t6.12.73-1\tamd64\tlinux-signed-amd64\t6.12.73+1"
    assert software.packages(dpkg(line), tmp_path, "6.12-amd64", {})[0][4] == ["kernel"]


def distribution(site: Path, name: str, *files: str) -> None:
    folder = site / f"{name}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n\nVersion: 2.0\n")
    (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_environments_are_those_that_a_link_leads_to(tmp_path: Path) -> None:
    opt = tmp_path.resolve() / "opt"
    for release in ("old", "new", "running"):
        distribution(opt / "llmkeep/releases" / release / SITE, release, f"{release}/__init__.py")
    (opt / "llmkeep/units").mkdir()
    (opt / "llmkeep/current").symlink_to("releases/new")
    (opt / "llmkeep/units/llm-gateway@a.service").symlink_to("../releases/running")
    (opt / "llmkeep/tree").symlink_to("/usr")
    rows = software.distributions(opt, {})
    assert [(name, version) for name, version, _, _ in rows] == [("new", "1.0"), ("running", "1.0")]
    assert rows[0][2] == str(opt / "llmkeep/releases/new")


def test_use_of_a_distribution_is_seen_where_it_has_native_code(tmp_path: Path) -> None:
    opt = tmp_path.resolve() / "opt"
    site = opt / "vllm/releases/a" / SITE
    distribution(site, "fast", "fast/_c.so")
    distribution(site, "idle", "idle/_c.abi3.so", "../../../bin/idle")
    distribution(site, "pure", "pure/__init__.py", "../../../bin/pure")
    (opt / "vllm/current").symlink_to("releases/a")
    rows = software.distributions(opt, {str(site / "fast/_c.so"): {"vllm@m.service"}})
    assert {name: units for name, _, _, units in rows} == {
        "fast": ["vllm@m.service"],
        "idle": [],
        "pure": None,
    }


def test_vendored_scripts_are_named_with_their_hash(tmp_path: Path) -> None:
    vendor = tmp_path.resolve() / "opt/llmkeep/releases/a" / SITE / "llmweb/static/vendor"
    vendor.mkdir(parents=True)
    (vendor / "marked.esm.js").write_text("x")
    (tmp_path / "opt/llmkeep/current").symlink_to("releases/a")
    ((name, digest, _),) = software.scripts(tmp_path.resolve() / "opt")
    assert (name, digest) == ("marked.esm.js", hashlib.sha256(b"x").hexdigest())


def test_units_that_run_replaced_files_are_named_and_sessions_are_not(tmp_path: Path) -> None:
    process(tmp_path, 12, "nginx.service", LIBSSL)
    process(tmp_path, 13, "session-3.scope", LIBSSL)
    assert software.replaced(services.mapped(tmp_path)) == ["nginx.service"]


def test_the_processes_of_this_run_are_left_out(tmp_path: Path) -> None:
    process(tmp_path, 12, "nginx.service", LIBSSL)
    assert services.mapped(tmp_path, "0::/system.slice/nginx.service\n") == {}


def test_the_module_prints_what_dpkg_has_here(capsys: pytest.CaptureFixture[str]) -> None:
    result = called(host_software, {}, capsys)
    read = json.loads(result["msg"])
    words = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package} ${source:Package}\\n"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    there = sorted(line.split()[1:] for line in lines if line.startswith("installed "))
    assert sorted([row[0], row[2]] for row in read["packages"]) == there
    assert (read["release"].split()[0], read["kernel"]) == ("debian", os.uname().release)
    assert not result["changed"]


def test_use_is_unknown_where_other_users_processes_are_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_CODENAME="trixie"\n')
    read = json.loads(called(host_software, {"root": str(tmp_path)}, capsys)["msg"])
    assert read["release"] == "debian trixie"
    assert {row[4] for row in read["packages"]} == {None}
