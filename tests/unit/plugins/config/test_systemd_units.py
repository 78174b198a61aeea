"""systemd_units with a stand-in for systemctl that keeps units in a folder and a record of what was asked."""

from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load
from unit_files import unit

systemd_units = load("modules.systemd_units")

# Each unit is a file with its properties; start, stop and enable rewrite it.
STAND_IN = """#!/bin/sh
cd "$UNITS" || exit 9
echo "$*" >> calls
verb=$1; shift
for last; do :; done
case $verb in
  show)
    shift 2; first=1
    for unit; do
      [ $first = 1 ] || echo; first=0
      if [ -f "$unit" ]; then cat "$unit"; else echo LoadState=not-found; echo ActiveState=inactive; fi
    done ;;
  start|restart|reload-or-restart)
    [ ! -f "$last.broken" ] || { echo "Job failed" >&2; exit 1; }
    sed -i 's/ActiveState=.*/ActiveState=active/' "$last" ;;
  stop) sed -i 's/ActiveState=.*/ActiveState=inactive/' "$last" ;;
  disable) sed -i 's/UnitFileState=.*/UnitFileState=disabled/' "$last" ;;
  enable) sed -i 's/UnitFileState=.*/UnitFileState=enabled/' "$last" ;;
  daemon-reload) sed -i 's/NeedDaemonReload=yes/NeedDaemonReload=no/' -- *.service ;;
esac
"""


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "units"
    folder.mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in (("systemctl", STAND_IN), ("journalctl", "#!/bin/sh\necho its last words\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("UNITS", str(folder))
    monkeypatch.setattr(systemd_units.atomic, "PENDING", tmp_path / "pending")
    return folder


def settle(check: bool = False, **parts: Any) -> list[str]:
    given = {"units": ["a.service"], "stopped": [], "stopped_others": None, "state": "started", **parts}
    result: list[str] = systemd_units.settle(given, check)
    return result


def test_leaves_a_running_unit_alone(units: Path) -> None:
    unit(units, "a.service")
    assert settle() == []
    assert "start" not in (units / "calls").read_text()


def test_enables_and_starts_what_is_off(units: Path) -> None:
    unit(units, "a.service", active="inactive", enabled="disabled")
    assert settle() == ["a.service: enabled", "a.service: start (was inactive)"]
    assert settle() == []


def test_check_mode_says_it_and_does_nothing(units: Path) -> None:
    unit(units, "a.service", active="inactive", enabled="disabled")
    before = (units / "a.service").read_text()
    assert len(settle(check=True, units=["a.service", "to-come.service"])) == 3
    assert (units / "a.service").read_text() == before


def test_restarts_a_unit_whose_file_changed_even_where_a_reload_was_asked(units: Path) -> None:
    unit(units, "a.service", reread="yes")
    assert settle(state="reloaded") == ["a.service: restart (was active)"]
    assert settle() == []


def test_reloads_what_an_interrupted_run_left_marked_and_takes_the_mark_away(units: Path) -> None:
    unit(units, "a.service")
    systemd_units.atomic.mark_pending(["a.service"])
    assert settle() == ["a.service: reload-or-restart (was active)"]
    assert settle() == []


def test_a_unit_that_does_not_start_is_named_with_its_last_messages(units: Path) -> None:
    unit(units, "a.service", active="failed")
    (units / "a.service.broken").touch()
    with pytest.raises(systemd_units.Refused, match=r"a\.service: systemctl start .*its last words"):
        settle()


def test_a_unit_that_is_not_there_is_refused(units: Path) -> None:
    with pytest.raises(systemd_units.Refused, match="not-found"):
        settle()
    assert not (units / "a.service").exists()


def test_stops_what_must_not_run(units: Path) -> None:
    unit(units, "a.service")
    unit(units, "apt-daily.timer")
    stopped = ["apt-daily.timer", "never-installed.service"]
    done = ["apt-daily.timer: stopped (was active)", "apt-daily.timer: disabled"]
    assert settle(units=[], stopped=stopped, check=True) == done
    assert settle(units=[], stopped=stopped) == done
    assert settle(units=[], stopped=stopped) == []
