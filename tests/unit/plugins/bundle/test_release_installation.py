"""release against a mirror of our own: wheels unpacked as pip would, and what is refused."""

import base64
import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_mirror import Served, publish
from called_module import called
from plugin_modules import load

release = load("modules.release")
Run = Callable[[dict[str, bytes]], dict[str, Any]]

INFO = "tool-1.0.dist-info"
FILES = {
    "tool/__init__.py": b"LIMITS = {'small', 'large'}\ndef main() -> None:\n    print('answers')\n",
    "tool/template.py": b"import {{ name }}\n",
    "tool/tests/__init__.py": b"",
    "tool-1.0.data/scripts/ask": b"#!python\nimport tool; tool.main()\n",
    "tool-1.0.data/data/share/tool/words": b"one\n",
    "tool-1.0.data/headers/tool.h": b"int tool;\n",
    "tool-1.0.data/purelib/beside.py": b"BESIDE = True\n",
    f"{INFO}/entry_points.txt": b"[console_scripts]\ntool = tool:main\n",
}
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
WHEEL = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel(
    files: dict[str, bytes] = FILES, requires: str = "", garbled: str = "", name: str = "tool"
) -> bytes:
    """A wheel of the distribution NAME; its RECORD has another hash of the file `garbled`."""
    info = INFO.replace("tool", name)
    metadata = METADATA.format(name=name) + (f"Requires-Dist: {requires}\n" if requires else "")
    files = {**files, f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": WHEEL}
    record = ""
    for path, content in files.items():
        digest = hashlib.sha256(content + (b"!" if path == garbled else b"")).digest()
        record += f"{path},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{len(content)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, content in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if "/scripts/" in path else 0o100644) << 16
            archive.writestr(entry, content)
    return packed.getvalue()


@pytest.fixture
def run(
    served: Served,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs of the module for a bundle with these wheels."""
    monkeypatch.syspath_prepend(tmp_path / "debian")
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian/installer").symlink_to("/usr/lib/python3/dist-packages/installer")
    pem = str(certificate / "cert.pem")
    given = {
        "url": served.url,
        "folder": "wheels/serving",
        "root": str(tmp_path / "root"),
        "over_debian": False,
    }

    def run(files: dict[str, bytes]) -> dict[str, Any]:
        publish(served, files, "wheels/serving")
        return called(release, {**given, "ca": pem, "keyring": pem}, capsys)

    return run


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each file below."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes()) for path in files}


def test_a_release_has_the_files_that_pip_would_install(run: Run, tmp_path: Path) -> None:
    answer = run({"tool-1.0-py3-none-any.whl": wheel()})
    ours = tmp_path / "root/releases" / answer["id"]
    (tmp_path / "tool-1.0-py3-none-any.whl").write_bytes(wheel())
    pips = tmp_path / "pips"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", pips], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--isolated",
        "--python",
        str(pips / "bin/python"),
        "install",
        "--quiet",
    ]
    subprocess.run([*pip, "--no-index", str(tmp_path / "tool-1.0-py3-none-any.whl")], check=True)
    modes = {path: mode for path, (mode, _) in content(ours).items()}
    expected = {path: mode for path, (mode, _) in content(pips).items()}
    site = "lib/python3.13/site-packages"
    assert modes.items() - expected.items() == {("release.json", 0o100644)}
    assert {path for path in expected.keys() - modes.keys() if "/tool/tests/__pycache__" not in path} == {
        f"{site}/{INFO}/{name}" for name in ("REQUESTED", "direct_url.json")
    }
    for name in ("tool", "ask"):
        assert subprocess.run([ours / "bin" / name], capture_output=True, check=True).stdout == b"answers\n"


def test_two_installations_of_a_release_are_equal(run: Run, tmp_path: Path) -> None:
    first = tmp_path / "root/releases" / run({"tool-1.0-py3-none-any.whl": wheel()})["id"]
    before = content(first)
    (first / "release.json").unlink()  # as a power cut leaves it
    (first / "leftover").touch()
    answer = run({"tool-1.0-py3-none-any.whl": wheel()})
    assert (answer["changed"], answer["id"]) == (True, first.name)
    after = content(first)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()
    assert any(path.endswith("__init__.cpython-313.pyc") for path in before)
    assert not run({"tool-1.0-py3-none-any.whl": wheel()})["changed"]


def test_a_file_that_differs_from_its_wheels_record_is_refused(run: Run, tmp_path: Path) -> None:
    said = run({"tool-1.0-py3-none-any.whl": wheel(garbled="tool/__init__.py")})["msg"]
    assert "tool/__init__.py didn't match RECORD" in said
    assert not list(tmp_path.glob("root/releases/*/release.json"))


def test_a_file_outside_of_the_environment_is_refused(run: Run, tmp_path: Path) -> None:
    files = {"../../../../../../escaped": b"x"}
    said = run({"tool-1.0-py3-none-any.whl": wheel(FILES | files)})["msg"]
    assert "has '../../../../../../escaped', outside of an environment" in said
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("name", "requires", "said"),
    [
        ("tool-1.0-py3-none-any.whl", "other", "tool requires other, which is not installed"),
        ("tool-1.0-py3-none-any.whl", "tool>2", "tool requires tool>2, and 1.0 is installed"),
        ("tool-1.0-cp39-none-any.whl", "", "tool-1.0-cp39-none-any.whl is not for this Python and processor"),
    ],
)
def test_a_release_that_is_not_whole_is_refused(
    name: str, requires: str, said: str, run: Run, tmp_path: Path
) -> None:
    assert said in run({name: wheel(requires=requires)})["msg"]
    assert not list(tmp_path.glob("root/releases/*/release.json"))


def test_requirements_of_other_systems_and_of_extras_need_not_be_met(run: Run) -> None:
    for marker in ("extra == 'more'", "sys_platform == 'win32'"):
        assert run({"tool-1.0-py3-none-any.whl": wheel(requires=f"other; {marker}")})["changed"]


def test_of_a_file_or_script_in_two_wheels_the_later_ones_stays(run: Run, tmp_path: Path) -> None:
    """As of `fastapi`, which fastapi and fastapi-cli have."""
    later = wheel(
        {
            "tool/__init__.py": b"LATER = True\n",
            "zool-1.0.data/scripts/ask": b"#!python\nimport zool\n",
            "zool-1.0.dist-info/entry_points.txt": b"[console_scripts]\ntool = zool:main\n",
        },
        name="zool",
    )
    answer = run({"tool-1.0-py3-none-any.whl": wheel(), "zool-1.0-py3-none-any.whl": later})
    environment = tmp_path / "root/releases" / answer["id"]
    assert (environment / "lib/python3.13/site-packages/tool/__init__.py").read_bytes() == b"LATER = True\n"
    assert all(b"zool" in (environment / "bin" / name).read_bytes() for name in ("ask", "tool"))
