"""What `lab demo` and `lab open` print of the pages."""

from pathlib import Path

import pytest

from lab import demo
from lab.door import Door
from lab.instance import Instance

TREE = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("inventory", "expected"),
    [
        (
            "inventory/lab",
            [
                ("chat page", "https://localhost:8443/"),
                ("  its key", "user-key"),
                ("operator page", "https://localhost:8443/operator/"),
                ("  its key", "operator-key"),
                ("CA to trust", "ca.pem"),
            ],
        ),
        ("inventory/lab/hosts.yml", []),
    ],
)
def test_pages_are_printed_with_their_keys_where_the_lab_has_them(
    inventory: str, expected: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    operator_key = tmp_path / "operator-key" if expected else None
    ca, key, env = (tmp_path / name for name in ("ca.pem", "user-key", "env"))
    opened = Door("https://localhost:8443", ca, key, env, operator_key)
    instance = Instance("never", [TREE / inventory], checkout=tmp_path)
    assert demo.pages(instance, opened) == expected
