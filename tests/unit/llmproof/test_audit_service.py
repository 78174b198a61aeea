"""The writer as a process, over its socket: what it acknowledged is on disk, whatever happens to it."""

import asyncio
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from audit_records import NAME, SEED, checked, event, sizes, whole
from waiting import until

from llmproof.chain import MAX_LINE, Chain, files
from llmproof.service import CONNECTIONS, ROOM, WAITING_BYTES, Service, notify


class Writer:
    """`llm-audit serve` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder / "record", folder / "audit.sock"
        (folder / "seed").write_text(SEED.hex() + "\n")
        self.log = folder / "log"
        self.options: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> "Writer":
        """Until it says READY."""
        self.options = [*options] or self.options
        address = self.folder.parent / "notify"
        address.unlink(missing_ok=True)
        command = [
            *self.command(),
            "--seed-file",
            str(self.folder.parent / "seed"),
            "--name",
            NAME,
            *self.options,
        ]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications, self.log.open("ab") as log:
            notifications.bind(str(address))
            notifications.settimeout(20)
            environment = os.environ | {"NOTIFY_SOCKET": str(address)}
            self.process = subprocess.Popen(command, stderr=log, env=environment)
            assert notifications.recv(100) == b"READY=1"
        return self

    def command(self) -> list[str]:
        """Without a seed."""
        paths = ["--folder", str(self.folder), "--socket", str(self.socket)]
        return [sys.executable, "-m", "llmproof", "serve", *paths]

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def end(self, number: signal.Signals) -> int:
        """A signal; its exit code."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(20)

    def client(self) -> "Client":
        return Client(self.socket)


class Client:
    """Hands in events and reads answers."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.answers = self.socket.makefile("r")

    def send(self, number: object, handed: object) -> None:
        self.socket.sendall(json.dumps({"n": number, "event": handed}).encode() + b"\n")

    def answer(self) -> str:
        return self.answers.readline().rstrip("\n")

    def until(self, number: int) -> list[str]:
        """All answers up to the one that NUMBER and all before it are on disk."""
        seen = [self.answer()]
        while seen[-1] != str(number):
            assert seen[-1], "the writer has closed the connection"
            seen.append(self.answer())
        return seen


@pytest.fixture
def writer() -> Iterator[Writer]:
    """In a folder with a short name: that of a socket has 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        made = Writer(Path(folder))
        yield made
        if made.process and made.process.poll() is None:
            made.end(signal.SIGKILL)


def test_what_is_handed_in_is_acknowledged_and_in_the_record_in_its_order(writer: Writer) -> None:
    client = writer.start().client()
    for number in range(1, 501):
        client.send(number, event(number))
    acknowledged = [int(answer) for answer in client.until(500)]
    assert acknowledged == sorted(acknowledged)
    assert len(acknowledged) < 500, "groups, not one sync a record"
    records = [json.loads(line) for line in whole(writer.folder)]
    assert [record["http.request.id"] for record in records] == [f"request-{n}" for n in range(1, 501)]
    assert writer.end(signal.SIGTERM) == 0
    assert sizes(writer.folder) == [500], "a head at the end"
    assert not writer.socket.exists()


def test_what_is_no_event_is_refused_by_its_number_and_the_rest_goes_on(writer: Writer) -> None:
    client = writer.start().client()
    client.send(1, event(1))
    for number, bad in ((2, []), (3, {}), (4, {"@timestamp": "x"}), (5, "x" * 1000)):
        client.send(number, bad)
    client.socket.sendall(b'{"n": 6, "event": {"a": ' + b"[" * 100_000 + b"\n")
    client.socket.sendall(
        b'{"n": 7, "event"\n{"n": 8}\n{"event": {"a": 1}}\nnonsense\n[]\n{"n": "9", "event": {"a": 1}}\n'
    )
    client.send(1, event(1))
    client.send(True, event(1))
    client.send(20, event(20))
    answers = client.until(20)
    refused = [answer for answer in answers if answer.startswith("!")]
    assert [answer.split()[0] for answer in refused] == [
        "!2", "!3", "!4", "!5", "!6", "!7", "!8", "!0", "!0", "!0", "!0", "!1", "!0"
    ]  # fmt: skip
    assert all(" " in answer for answer in refused), "each with a reason"
    assert len(whole(writer.folder)) == 2
    assert checked(writer.folder).ok


def test_a_record_over_one_mebibyte_is_refused_and_the_next_one_written(writer: Writer) -> None:
    client = writer.start().client()
    client.send(1, {"a": "x" * (MAX_LINE + 1)})
    assert client.answer().startswith("!1 ")
    client.send(2, {"a": "x" * 20 * MAX_LINE})
    assert client.answer().startswith("!2 ")
    client.send(3, {"a": "x" * (MAX_LINE - 100)})
    assert client.answer() == "3"
    assert len(whole(writer.folder)) == 1
    assert checked(writer.folder).ok


def test_heads_are_signed_regularly_and_only_over_something_new(writer: Writer) -> None:
    client = writer.start("--head-seconds", "0.2").client()
    for number in (1, 2):
        client.send(number, event(number))
        client.until(number)
        until(lambda last=number: sizes(writer.folder)[-1:] == [last])  # type: ignore[misc]
        time.sleep(0.7)  # for one more, if there were
    assert sizes(writer.folder) == [1, 2]
    assert checked(writer.folder).open_tail == 0


def test_a_second_writer_is_refused_and_the_first_one_goes_on(writer: Writer) -> None:
    client = writer.start().client()
    command = [*writer.command(), "--seed-file", str(writer.folder.parent / "seed")]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "since there can be only one writer" in second.stderr
    client.send(1, event(1))
    assert client.answer() == "1"


def test_without_a_seed_it_does_not_start(writer: Writer, tmp_path: Path) -> None:
    command = writer.command()
    environment = {key: value for key, value in os.environ.items() if key != "CREDENTIALS_DIRECTORY"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, "no credential llm-audit.seed" in done.stderr) == (1, True)
    (tmp_path / "llm-audit.seed").write_text("00")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    )
    assert (done.returncode, "64 hex digits" in done.stderr) == (1, True)


def test_a_client_that_floods_and_does_not_read_is_slowed_and_memory_stays_bounded(writer: Writer) -> None:
    writer.start()
    peak_before = peak(writer)
    stuck = writer.client()
    stuck.socket.settimeout(2)
    refused = json.dumps({"n": -1, "event": {"a": "x" * 3000}}).encode() + b"\n"
    with pytest.raises(TimeoutError):
        send_again_and_again(stuck, refused * 100, 1000)  # 300 MB, and 100,000 answers that it never reads
    others = writer.client()
    others.send(1, event(1))
    assert others.answer() == "1", "the others are served"
    assert peak(writer) - peak_before < 60_000


def send_again_and_again(client: Client, data: bytes, times: int) -> None:
    for _ in range(times):
        client.socket.sendall(data)


class Stuck(Chain):
    """A record on a disk that stands still until `go`."""

    go = threading.Event()

    def write(self, bodies: Sequence[bytes]) -> range:
        assert self.go.wait(20)
        return super().write(bodies)


def test_while_the_disk_stands_still_little_is_taken_in_and_afterwards_all_of_it(writer: Writer) -> None:
    chain = Stuck(writer.folder, SEED, NAME)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(writer.socket))
    listener.listen()
    listener.setblocking(False)
    handed_in = []

    def flood() -> None:
        client = writer.client()
        for number in range(1, 2001):  # 40 MB
            client.send(number, {"a": "x" * 20_000})
            handed_in.append(number)
        client.until(2000)

    async def scenario() -> int:
        service = Service(chain)
        running = asyncio.create_task(service.run(listener))
        thread = threading.Thread(target=flood)
        thread.start()
        await asyncio.sleep(2)
        most, sent = service.waiting_bytes, len(handed_in)
        assert sent < 1000
        Stuck.go.set()
        await asyncio.to_thread(thread.join, 20)
        service.stop()
        await running
        return most

    with chain:
        assert asyncio.run(scenario()) < WAITING_BYTES + 1_000_000
    assert len(whole(writer.folder)) == len(handed_in) == 2000
    assert checked(writer.folder).ok


def peak(writer: Writer) -> int:
    """The most memory it ever had, in kB."""
    status = Path(f"/proc/{writer.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def test_killed_at_any_moment_under_load_it_loses_nothing_that_it_acknowledged(writer: Writer) -> None:
    values, kills = random.Random(3), 8  # noqa: S311 - moments, no secrets
    acknowledged: dict[str, int] = {}
    for round_number in range(kills):
        writer.start("--head-seconds", "0.05", "--rotate-mib", "0.2")
        ends = handing_in(writer, [f"{round_number}-{n}" for n in range(8)], acknowledged)
        if round_number == kills - 1:  # however slow the disk: what is looked at below is there
            until(lambda: sum(acknowledged.values()) > 1000 and len(sizes(writer.folder)) > 1, 60)
        time.sleep(values.uniform(0.05, 0.5))
        assert writer.end(signal.SIGKILL) == -signal.SIGKILL
        for thread in ends:
            thread.join(20)
    writer.start()
    assert writer.end(signal.SIGTERM) == 0
    written: dict[str, int] = {}
    for record in map(json.loads, whole(writer.folder)):
        if "user.id" in record:
            client, number = record["user.id"], int(record["http.request.id"])
            assert written.get(client, 0) == number - 1, "in its order, nothing left out, nothing twice"
            written[client] = number
    assert len(acknowledged) == kills * 8
    assert sum(acknowledged.values()) > 1000
    for client, number in acknowledged.items():
        assert written.get(client, 0) >= number
    report = checked(writer.folder, writer.folder / "heads")
    assert report.findings == []
    assert report.records == len(whole(writer.folder))
    assert report.heads > 1


def handing_in(writer: Writer, names: list[str], acknowledged: dict[str, int]) -> list[threading.Thread]:
    """Clients that are connected, and at it from now on."""
    acknowledged |= dict.fromkeys(names, 0)
    threads = [threading.Thread(target=hand_in_until_it_dies, args=[writer.client(), name, acknowledged])
               for name in names]  # fmt: skip
    for thread in threads:
        thread.start()
    return threads


def hand_in_until_it_dies(client: Client, name: str, acknowledged: dict[str, int]) -> None:
    """One event after the other, several on their way; notes what was acknowledged last."""
    number = 0
    try:
        while True:
            for _ in range(5):
                number += 1
                client.send(number, {"user.id": name, "http.request.id": str(number), "filler": "x" * 300})
            while acknowledged[name] < number:
                answer = client.answer()
                if not answer.isdigit():
                    return
                acknowledged[name] = int(answer)
    except OSError:
        return
    finally:
        client.socket.close()


def test_a_full_disk_refuses_and_then_goes_on(writer: Writer) -> None:
    writer.start("--head-seconds", "0.1")
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    client = writer.client()
    answers = []
    for number in range(1, 21):
        client.send(number, event(number))
        answers.append(client.answer())
    written = sum(answer.isdigit() for answer in answers)
    assert 1 < written < 20
    assert answers[-1].startswith("!20 the record cannot be written: File too large")
    assert len(whole(writer.folder)) == written
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    client.send(21, event(21))
    assert client.answer() == "21"
    assert writer.end(signal.SIGTERM) == 0
    assert checked(writer.folder).ok
    assert "records were not written" in writer.log.read_text()


@pytest.fixture
def small_volume(writer: Writer) -> Iterator[Path]:
    """The record's volume, of 1 MiB; a tenth of it is for intents and outcomes."""
    writer.folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(writer.folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: run it as root")
    yield writer.folder
    if writer.process and writer.process.poll() is None:
        writer.end(signal.SIGKILL)
    subprocess.run(["umount", str(writer.folder)], check=True)


def refusal(code: str, count: int = 1) -> dict[str, object]:
    return {
        "llmkeep.audit.phase": "refused",
        "error.code": code,
        "llmkeep.audit.count": count,
        "filler": "x" * 500,
    }


def test_refusals_are_counted_before_the_volume_is_full_and_intents_are_still_written(
    writer: Writer, small_volume: Path
) -> None:
    client = writer.start("--head-seconds", "0.2").client()
    client.send(1, refusal("written"))
    client.until(1)
    number = 2
    while os.statvfs(small_volume).f_bavail * 4096 >= 2**20 // 10:
        client.send(number, refusal("flood"))
        client.until(number)
        number += 1
    (small_volume / "filler").write_bytes(bytes(8192))
    for code, count in (("forbidden", 1), ("forbidden", 1), ("unauthenticated", 40)):
        number += 1
        client.send(number, refusal(code, count))
    number += 1
    client.send(number, event(7))
    client.send(number + 1, event(7, "outcome"))
    client.until(number + 1)
    until(lambda: b'"withheld"' in whole(small_volume)[-1])
    intent, outcome, withheld = (json.loads(line) for line in whole(small_volume)[-3:])
    assert (intent["llmkeep.audit.phase"], outcome["llmkeep.audit.phase"]) == ("intent", "outcome")
    assert withheld["llmkeep.audit.count"] == 42
    assert withheld["llmkeep.audit.codes"] == {"forbidden": 2, "unauthenticated": 40}
    (small_volume / "filler").unlink()
    for path in files(small_volume):
        assert path.stat().st_size < 950_000
    assert writer.end(signal.SIGTERM) == 0
    assert checked(small_volume).ok


def test_what_was_counted_is_on_record_when_the_writer_stops(writer: Writer, small_volume: Path) -> None:
    client = writer.start("--reserve-mib", "1000", "--head-seconds", "1000").client()
    (small_volume / "filler").write_bytes(bytes(960_000))
    for number in range(1, 101):
        client.send(number, refusal(f"code-{number}"))
    client.until(100)
    assert writer.end(signal.SIGTERM) == 0
    (said,) = (json.loads(line) for line in whole(small_volume))
    assert (said["event.action"], said["llmkeep.audit.count"], len(said["llmkeep.audit.codes"])) == (
        "withheld",
        100,
        33,
    )


def test_while_no_head_can_be_signed_records_are_refused_and_then_taken_again(writer: Writer) -> None:
    client = writer.start("--head-seconds", "0.1", "--unsigned-seconds", "0.5").client()
    (writer.folder / "heads").mkdir()
    number = 0

    def answered() -> str:
        nonlocal number
        number += 1
        client.send(number, event(number))
        return client.answer()

    until(
        lambda: answered().startswith(
            f"!{number} the record cannot be written: records have been without a signed head"
        )
    )
    written = len(whole(writer.folder))
    assert answered().startswith("!")
    assert len(whole(writer.folder)) == written, "the tail does not grow"
    (writer.folder / "heads").rmdir()
    until(lambda: answered().isdigit())
    assert writer.end(signal.SIGTERM) == 0
    assert checked(writer.folder).ok


def test_what_a_killed_writer_left_without_a_head_is_signed_at_the_start(writer: Writer) -> None:
    client = writer.start().client()
    client.send(1, event(1))
    client.until(1)
    writer.end(signal.SIGKILL)
    assert sizes(writer.folder) == []
    writer.start()
    until(lambda: sizes(writer.folder) == [1])


def test_sigterm_under_load_writes_what_it_took_and_signs_it(writer: Writer) -> None:
    writer.start()
    acknowledged: dict[str, int] = {}
    threads = handing_in(writer, [str(n) for n in range(4)], acknowledged)
    until(lambda: sum(acknowledged.values()) > 100, 60)
    assert writer.end(signal.SIGTERM) == 0
    for thread in threads:
        thread.join(20)
    report = checked(writer.folder)
    assert report.ok
    assert report.open_tail == 0
    assert report.records >= sum(acknowledged.values()) > 100


def test_the_socket_has_the_mode_that_was_asked_for(writer: Writer) -> None:
    writer.start("--socket-mode", "0620")
    assert writer.socket.stat().st_mode & 0o7777 == 0o620


def test_a_socket_that_a_killed_writer_left_is_replaced(writer: Writer) -> None:
    writer.start()
    writer.end(signal.SIGKILL)
    assert writer.socket.is_socket()
    client = writer.start().client()
    client.send(1, event(1))
    assert client.answer() == "1"


def test_sigint_ends_it_as_sigterm_does(writer: Writer) -> None:
    client = writer.start().client()
    client.send(1, event(1))
    assert client.answer() == "1"
    assert writer.end(signal.SIGINT) == 0
    assert sizes(writer.folder) == [1]


def test_numbers_may_begin_at_zero_and_leave_some_out(writer: Writer) -> None:
    client = writer.start().client()
    for number in (0, 7, 8):
        client.send(number, event(number))
        assert client.answer() == str(number)


def test_a_refusal_is_one_line_with_the_number_and_the_reason(writer: Writer) -> None:
    client = writer.start().client()
    client.socket.sendall(b' { "n" : 12 , "event": {"a": nul}}\n')
    assert client.answer() == "!12 Expecting value: line 1 column 30 (char 29)"
    client.socket.sendall(b'{"n": 13}\n')
    assert client.answer() == "!13 'event'"
    client.socket.sendall(b'{"event": {}, "n": 14}\n')
    assert client.answer() == "!0 an event is a JSON object with at least one field"


@pytest.mark.parametrize(
    "members",
    [
        b'"n": 1, "event": {"user.id": "a", "user.id": "b"}',
        b'"n": 1, "event": {"user.id": "a", "user\\u002eid": "b"}',
        b'"n": 1, "event": {"a": {"b": [{"c": 1, "c": 1}]}}',
        b'"n": 1, "event": {"a": 1}, "event": {"a": 2}',
    ],
)
def test_a_member_that_is_there_twice_is_refused(writer: Writer, members: bytes) -> None:
    client = writer.start().client()
    client.socket.sendall(b"{" + members + b"}\n")
    assert client.answer().endswith(" is a duplicate: remove one")
    assert whole(writer.folder) == []


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"1e999"])
def test_a_number_that_json_does_not_have_is_refused(writer: Writer, number: bytes) -> None:
    client = writer.start().client()
    client.socket.sendall(b'{"n": 1, "event": {"a": [%b]}}\n' % number)
    assert client.answer() == f"!1 {number.decode()} is not a JSON number: send a smaller one, or null"


@pytest.mark.parametrize(
    ("message", "written"),
    [
        (b'{"n":1,"event":{"a":"x/y","b":[1.50,{}]}}', b'"a":"x/y","b":[1.50,{}]'),
        (b'{"n": 1, "event": {"a": "}"} } ', b'"a": "}"'),
        (b'{"n": 1, "event": {"a": "\xc3\xbc"}}', b'"a":"\\u00fc"'),
        (b'{"n": 1, "event": {"a":\r\t1}}', b'"a":1'),
        (b'{"event": {"a": 1}, "n": 1}', b'"a":1'),
        (b'{"n": 1, "event": {"a": 1}, "more": {}}', b'"a":1'),
    ],
)
def test_an_event_is_written_as_it_came_if_no_reader_sees_more_than_one_line(
    writer: Writer, message: bytes, written: bytes
) -> None:
    client = writer.start().client()
    client.socket.sendall(message + b"\n")
    assert client.answer() == "1"
    (line,) = whole(writer.folder)
    assert line.split(b'Z",', 1)[1].startswith(written + b',"llmkeep.audit.previous"')
    assert checked(writer.folder).ok


def test_a_line_has_room_for_its_number_around_an_event_and_for_no_more(writer: Writer) -> None:
    client = writer.start().client()
    start, end = b'{"n": 14, "event": {"a": "', b'"}}'
    longest = start + b"x" * (MAX_LINE + ROOM - len(start + end)) + end
    client.socket.sendall(longest + b"\n")
    assert client.answer().startswith("!14 it has ")
    client.socket.sendall(longest + b" \n")
    assert client.answer().startswith("!14 the line has more than ")


def test_a_line_that_comes_in_pieces_is_one_event(writer: Writer) -> None:
    client = writer.start().client()
    for piece in (b'{"n": 1, "ev', b'ent": {"a":', b' "b"}}\n{"n": 2', b', "event": {"c": 1}}\n'):
        client.socket.sendall(piece)
        time.sleep(0.05)
    client.until(2)
    assert [[*json.loads(line)][2] for line in whole(writer.folder)] == ["a", "c"]


def test_one_connection_too_many_is_turned_away_and_the_others_are_served(writer: Writer) -> None:
    writer.start()
    clients = []
    for _ in range(CONNECTIONS):
        clients.append(writer.client())
        clients[-1].send(1, {"a": 1})
        assert clients[-1].answer() == "1"
    assert told(writer) == ""
    clients[0].socket.shutdown(socket.SHUT_RDWR)
    until(lambda: told(writer) == "1")


def test_clients_that_connect_at_once_wait_while_it_is_busy(writer: Writer) -> None:
    writer.start()
    os.kill(writer.pid, signal.SIGSTOP)
    waiting = []
    for _ in range(CONNECTIONS):
        waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        waiting[-1].setblocking(False)
        waiting[-1].connect(str(writer.socket))  # raises BlockingIOError where the queue is full
    os.kill(writer.pid, signal.SIGCONT)
    for each in waiting:
        each.close()


def told(writer: Writer) -> str:
    """What a new client is answered; nothing if it is turned away."""
    client = writer.client()
    try:
        client.send(1, event(1))
        return client.answer()
    except ConnectionError:
        return ""


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_notified_at_a_path_and_at_an_abstract_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"llm-audit-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind("\0" + name if abstract else name)
        notifications.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        notify("STATUS=ready")
        assert notifications.recv(100) == b"STATUS=ready"


def test_without_systemd_nothing_is_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("STATUS=ready")


def test_a_file_is_rotated_at_the_size_that_was_asked_for(writer: Writer) -> None:
    client = writer.start("--rotate-mib", "0.001").client()  # 1,048 bytes: two records
    for number in range(1, 5):
        client.send(number, event(number))
        assert client.answer() == str(number)
    assert [len(path.read_bytes().splitlines()) for path in files(writer.folder)] == [2, 2]
