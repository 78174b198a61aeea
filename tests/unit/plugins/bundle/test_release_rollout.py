"""release_rollout with a stand-in for systemctl, and gateways that answer /readyz as the release behind their link would."""

import http.server
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load
from unit_files import unit

release_rollout = load("modules.release_rollout")
GATEWAYS = ["llm-gateway@1.service", "llm-gateway@2.service"]
ENGINE = "llm-engine@m.service"

# Each unit is a file with its properties. What a release has as EXITS does not start there.
STAND_IN = """#!/bin/sh
cd "$UNITS" || exit 9
verb=$1; shift
for last; do :; done
case $verb in
  show)
    shift 2; first=1
    for unit; do [ $first = 1 ] || echo; first=0; cat "$unit"; done ;;
  restart)
    release=$(readlink "$ROOT/units/$last"); release=${release##*/}
    echo "$last $release" >> restarts
    [ ! -f "$ROOT/releases/$release/EXITS" ] || { echo "Job failed" >&2; exit 1; }
    sed -i 's/ActiveState=.*/ActiveState=active/' "$last" ;;
  disable) echo "$last stopped" >> restarts ;;
  list-units) if [ -f gone ]; then cat gone; fi ;;
esac
"""


@dataclass
class Host:
    """A host with releases `old` (current, run by all) and `new`."""

    folder: Path
    not_ready: set[tuple[str, str]] = field(default_factory=set)  # unit and release
    says: bytes = b"no policy decides"  # of a gateway that is not ready

    @property
    def root(self) -> Path:
        return self.folder / "opt"

    def runs(self, name: str) -> str:
        return (self.root / "units" / name).readlink().name

    def restarts(self) -> list[str]:
        path = self.folder / "units/restarts"
        return path.read_text().splitlines() if path.exists() else []

    def roll(self, release: str = "new", check: bool = False, hold: bool = False, **more: Any) -> Any:
        every = {"hold": False, "settle_seconds": 0}
        units = [{**every, "name": ENGINE, "socket": None, "hold": hold}]
        units += [{**every, "name": name, "socket": self.socket(name)} for name in GATEWAYS]
        given = {"release": release, "root": str(self.root), "units": units, "stopped_others": [], **more}
        given |= {"ready_seconds": 0.5, "unit_files": str(self.folder / "system")}
        return release_rollout.settle(given, check)

    def socket(self, name: str) -> str:
        return str(self.folder / f"{name[12]}.sock")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(tmp_path)
    for folder in ("units", "bin", "system", "opt/releases/old/etc", "opt/releases/new/etc", "opt/units"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in (("systemctl", STAND_IN), ("journalctl", "#!/bin/sh\necho its last words\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("UNITS", str(tmp_path / "units"))
    monkeypatch.setenv("ROOT", str(host.root))
    monkeypatch.setattr(release_rollout.atomic, "PENDING", tmp_path / "pending")
    monkeypatch.setattr(release_rollout, "STEADY_SECONDS", 0.05)
    (host.root / "current").symlink_to("releases/old")
    servers = []
    for name in [ENGINE, *GATEWAYS]:
        unit(tmp_path / "units", name)
        (host.root / "units" / name).symlink_to("../releases/old")
        if name in GATEWAYS:
            servers.append(answering(host, name))
    yield host
    for server in servers:
        server.shutdown()
        server.server_close()


def answering(host: Host, name: str) -> socketserver.UnixStreamServer:
    """A gateway of this name."""

    class Readiness(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ready = (name, host.runs(name)) not in host.not_ready
            self.send_response(200 if ready else 503)
            self.end_headers()
            self.wfile.write(host.says)

        def address_string(self) -> str:
            return "somebody"

        def log_message(self, *_: object) -> None:
            pass

    server = socketserver.ThreadingUnixStreamServer(host.socket(name), Readiness)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def test_moves_one_after_the_other_and_switches_current_last(host: Host) -> None:
    done = host.roll()
    assert host.restarts() == [f"{name} new" for name in [ENGINE, *GATEWAYS]]
    assert done.changes[-1] == "current: new"
    assert (host.root / "current").readlink() == Path("releases/new")
    assert host.roll().changes == []


def test_check_mode_says_it_and_does_nothing(host: Host) -> None:
    assert len(host.roll(check=True).changes) == 4
    assert host.restarts() == []
    assert host.runs(ENGINE) == "old"


def test_a_release_whose_gateway_exits_is_left_again_and_the_other_gateway_never_sees_it(host: Host) -> None:
    (host.root / "releases/new/EXITS").touch()
    with pytest.raises(
        release_rollout.Refused, match=r"release new does not work .*its last words.* run release old"
    ):
        host.roll(hold=True)
    assert host.restarts() == [f"{GATEWAYS[0]} new", f"{GATEWAYS[0]} old"]
    assert (host.root / "current").readlink() == Path("releases/old")
    assert not list((host.folder / "pending").iterdir())


def test_where_the_second_gateway_is_not_ready_both_go_back_the_last_one_first(host: Host) -> None:
    host.not_ready.add((GATEWAYS[1], "new"))
    with pytest.raises(release_rollout.Refused, match=r"not ready after 0\.5 s; .* 503 no policy decides"):
        host.roll(hold=True)
    assert host.restarts() == [
        f"{GATEWAYS[0]} new",
        f"{GATEWAYS[1]} new",
        f"{GATEWAYS[1]} old",
        f"{GATEWAYS[0]} old",
    ]


def test_the_way_back_brings_the_former_release_s_unit_files_too(host: Host) -> None:
    (host.root / "releases/new/EXITS").touch()
    (host.root / "releases/old/etc/llm-gateway@.service").write_text("as before")
    (host.folder / "system/llm-gateway@.service").write_text("of the new release")
    with pytest.raises(release_rollout.Refused):
        host.roll()
    assert (host.folder / "system/llm-gateway@.service").read_text() == "as before"


def test_quarantined_gpus_are_no_reason_against_a_release(host: Host) -> None:
    host.not_ready = {(name, release) for name in GATEWAYS for release in ("old", "new")}
    host.says = b'{"error": {"message": "1 of 1 engines", "param": null, "code": "quarantined"}}'
    host.roll()
    assert (host.root / "current").readlink().name == "new"


def test_a_gateway_that_is_not_ready_goes_first(host: Host) -> None:
    host.not_ready.add((GATEWAYS[1], "old"))
    host.roll(hold=True)
    assert host.restarts() == [f"{GATEWAYS[1]} new", f"{GATEWAYS[0]} new"]


def test_the_next_of_several_engines_waits_until_the_one_before_was_found_again(host: Host) -> None:
    twins = [ENGINE, "llm-engine@m-2.service"]
    unit(host.folder / "units", twins[1])
    (host.root / "units" / twins[1]).symlink_to("../releases/old")
    began = time.monotonic()
    host.roll(units=[{"name": name, "socket": None, "hold": False, "settle_seconds": 0.3} for name in twins])
    assert host.restarts() == [f"{name} new" for name in twins]
    assert time.monotonic() - began > 0.6


def test_nothing_waits_for_the_requests_of_an_engine_that_is_new(host: Host) -> None:
    (host.root / "units" / ENGINE).unlink()
    began = time.monotonic()
    host.roll(units=[{"name": ENGINE, "socket": None, "hold": False, "settle_seconds": 60}])
    assert host.restarts() == [f"{ENGINE} new"]
    assert time.monotonic() - began < 60


def test_what_is_held_stays_on_its_release_and_is_told(host: Host) -> None:
    assert host.roll(hold=True).held == [ENGINE]
    assert (host.runs(ENGINE), host.runs(GATEWAYS[0])) == ("old", "new")
    assert host.roll(hold=False).changes == [f"{ENGINE}: old -> new"]


def test_what_is_held_and_does_not_run_is_moved(host: Host) -> None:
    unit(host.folder / "units", ENGINE, active="failed")
    assert host.roll(hold=True).held == []
    assert host.runs(ENGINE) == "new"


def test_a_run_that_died_between_link_and_restart_is_ended_by_the_next(host: Host) -> None:
    host.roll()
    release_rollout.atomic.mark_pending([GATEWAYS[1]])
    before = len(host.restarts())
    host.roll()
    assert host.restarts()[before:] == [f"{GATEWAYS[1]} new"]


def test_without_a_former_release_there_is_no_way_back_and_it_says_so(host: Host) -> None:
    (host.root / "units" / ENGINE).unlink()
    (host.root / "releases/new/EXITS").touch()
    with pytest.raises(release_rollout.Refused, match="no other release to roll back to"):
        host.roll()


def test_an_instance_that_is_no_longer_wanted_is_stopped_and_its_link_goes(host: Host) -> None:
    (host.folder / "units/gone").write_text("llm-gateway@3.service loaded active running\n")
    (host.root / "units/llm-gateway@3.service").symlink_to("../releases/old")
    host.roll(stopped_others=["llm-gateway*.service"])
    assert host.restarts()[-1] == "llm-gateway@3.service stopped"
    assert not (host.root / "units/llm-gateway@3.service").is_symlink()
