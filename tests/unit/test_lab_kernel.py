"""What the user-mode kernel needs on the processor that it finds."""

from pathlib import Path

import pytest

from lab import kernel


@pytest.mark.parametrize(
    ("flags", "needs"), [("fpu avx512f amx_tile amx_int8", True), ("fpu avx512f", False)]
)
def test_processors_with_amx_get_the_library_that_sets_all_registers(
    tmp_path: Path, flags: str, needs: bool
) -> None:
    processor = tmp_path / "cpuinfo"
    processor.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n", encoding="ascii")
    environment = kernel.environment(tmp_path, processor)
    assert bool(environment) is needs
    assert all(Path(library).is_file() for library in environment.values())
