"""`llmkeep inventory new`: what it writes passes `inventory check`, and what it refuses leaves no file."""

import builtins
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkeep import cli
from llmkeep.inventory import check, commands, new
from llmkeep.inventory.hosts import Disk, Host, hosts, table

TREE = Path(__file__).parents[3]
GROUPS = new.groups_of(TREE)
HOSTS = """\
name,address,groups,gpus,gpu_name,gpu_memory,disks
ops1,10.20.30.11,control prometheus,,,,
llm1,10.20.30.21,serve vllm edge,8,NVIDIA A100-SXM4-80GB,80G,S1:2T:data S2::audit S3:10G:feedback
gpu1,10.20.30.31,train,8,,,S4:4T:data
"""
FLAGS = [
    *(
        "--operators",
        "10.20.10.0/24",
        "--requests-per-day",
        "50000",
        "--model",
        "deepseek-v2.5",
        "--context",
        "8192",
    ),
    *("--alert-mail", "operators@example.org", "alerts@example.org", "10.20.30.50:587"),
    *("--backup", "sftp:backup@10.20.30.60:/srv/backup/estate"),
    *("--hsm-module", "/usr/lib/vendor/libpkcs11.so", "--hsm", "10.20.30.40:1792"),
]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on a table; returns exit code and messages."""

    def new_inventory(table_of_hosts: str | bytes, *words: str) -> tuple[int, str]:
        content = table_of_hosts.encode() if isinstance(table_of_hosts, str) else table_of_hosts
        (tmp_path / "hosts.csv").write_bytes(content)
        out = ["--out", str(tmp_path / "made/hosts.yml")]
        code = cli.main(["inventory", "new", "--hosts", str(tmp_path / "hosts.csv"), *out, *words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return new_inventory


def faults_of(rows: str) -> list[str]:
    """Faults of hosts with the columns name, address, groups and, if there is a fourth, disks."""
    content = f"name,address,groups,disks\nops1,10.0.0.1,control,\n{rows}".encode()
    return hosts(table(content, "hosts.csv"), GROUPS, "estate.internal")[1]


def test_an_estate_with_volumes_passes_the_check_and_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    code, message = run(HOSTS, *FLAGS)
    assert (code, "3 hosts, no fault found" in message) == (0, True), message
    made = tmp_path / "made/hosts.yml"
    text = made.read_text()
    estate = yaml.safe_load(text)["all"]
    assert cli.main(["inventory", "check", "-i", str(made)]) == 0
    assert {*estate["children"]["mirror"]["hosts"]} == {"ops1"}
    assert {*estate["children"]["storage"]["hosts"]} == {"llm1", "gpu1"}
    example = yaml.safe_load((TREE / "inventory/example/hosts.yml").read_text())["all"]["children"]["storage"]
    volumes = {row["name"]: row for row in estate["hosts"]["llm1"]["luks_volumes"]}
    for expected in example["hosts"]["llm1"]["luks_volumes"]:
        assert {name: volumes[expected["name"]][name] for name in ("mount", "units")} == {
            name: expected[name] for name in ("mount", "units")
        }
    assert volumes["audit"]["size"] == f"{new.audit_gib(50_000, 180)}G"
    assert estate["hosts"]["ops1"]["base_open_out"] == [
        {"addresses": ["10.20.30.50"], "port": 587},
        {"addresses": ["10.20.30.60"], "port": 22},
    ]
    assert "#   443/tcp (edge_port): clients, ops1 -> llm1" in text
    assert "llm/rates/data.yaml: batch, high, standard;" in text
    code, message = run(HOSTS, *FLAGS)
    assert code == 1
    assert f"{made} exists, and was not changed: choose another path with --out" in message
    assert made.read_text() == text


def test_gateways_without_models_use_those_of_hosts_with_engines(run: Run, tmp_path: Path) -> None:
    content = "name,address,groups\nops1,10.0.0.1,control\nedge1,10.0.0.2,serve edge\nllm1,10.0.0.3,engines\n"
    code, message = run(content, "--operators", "10.0.1.0/24")
    assert (code, "3 hosts, no fault found" in message) == (0, True), message
    estate = yaml.safe_load((tmp_path / "made/hosts.yml").read_text())["all"]["hosts"]
    assert estate["edge1"]["llm_serving_models"] == []
    assert [model["driver"] for model in estate["llm1"]["llm_serving_models"]] == ["naive"]


def test_the_template_is_a_table_that_passes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inventory", "new", "--template"]) == 0
    template = capsys.readouterr().out
    assert all(f"# group {group}: " in template for group in GROUPS)
    code, message = run(template, *FLAGS)
    assert (code, "2 hosts, no fault found" in message) == (0, True), message


@pytest.mark.parametrize("encode", [
    lambda text: b"\xef\xbb\xbf" + text.encode(),
    lambda text: text.replace(",", ";").encode(),
    lambda text: text.replace(",", "\t").replace("\n", "\r\n").encode(),
    lambda text: b"\xef\xbb\xbf# a, note\r\n" + text.replace(",", ";").replace("\n", ";;\r\n").encode(),
    lambda text: text.replace("name,address,groups,gpus,gpu_name", "Name,Address,Groups,GPUs,GPU name").encode(),
])  # fmt: skip
def test_a_spreadsheets_ways_of_saving_a_table_are_read(encode: Callable[[str], bytes]) -> None:
    inventory, faults = hosts(table(encode(HOSTS), "hosts.csv"), GROUPS, "estate.internal")
    assert faults == []
    assert inventory[1] == Host(
        "llm1",
        "10.20.30.21",
        tuple(group for group in GROUPS if group in {"storage", "gpu", "vllm", "serve", "edge"}),
        8,
        "NVIDIA A100-SXM4-80GB",
        "80G",
        (Disk("S1", "2T", "data"), Disk("S2", "", "audit"), Disk("S3", "10G", "feedback")),
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "hosts.csv is empty: start with `llmkeep inventory new --template`"),
        ("# a comment\n\n", "hosts.csv is empty"),
        ("name,address,groups\n", "hosts.csv names no host"),
        ("name,adress,groups\na,b,c\n", "has the column 'adress', which is unknown: did you mean address?"),
        ("name,name,groups\na,b,c\n", "has the column 'name', twice"),
        ("ops1,10.0.0.1,control\n", "has the column 'ops1', which is unknown"),
        ("name,address\na,b\n", "lacks groups in its first line"),
        (
            "name,address,groups\na,10.0.0.1,serve,edge\n",
            "line 2: it has 4 cells, but the table has 3 columns",
        ),
        (
            "name,address,groups\nb\xe4r,10.0.0.1,serve\n".encode("latin-1"),
            "not UTF-8 (byte 0xe4 at offset 21)",
        ),
    ],
)
def test_what_is_no_table_of_hosts_is_refused(
    content: str | bytes, fault: str, run: Run, tmp_path: Path
) -> None:
    code, message = run(content)
    assert code == 1
    assert fault in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ("ops1,10.0.0.2,serve", "line 3: ops1 is also the name of line 2: give each host its own"),
        ("ops1.estate.internal,10.0.0.2,serve", "is also the name of line 2"),
        ("llm1,10.0.0.1,serve", "line 3: 10.0.0.1 is also the address of line 2: give each host its own"),
        ("llm1,fd00::1,serve\nllm2,FD00:0::1,serve", "line 4: fd00::1 is also the address of line 3"),
        ("llm1,10.0.0.2,serv", "line 3: the group serv is unknown: did you mean serve?"),
        ("llm1,10.0.0.2,", "line 3: groups is empty: write one or more of control, "),
        ("llm1,llm1.example.org,serve", "the address is 'llm1.example.org': write the IP address"),
        ("llm1,127.0.0.1,serve", "the address is '127.0.0.1': write the IP address"),
        ("LLM_1,10.0.0.2,serve", "the name is 'LLM_1': write lowercase letters, digits and dashes"),
        ("serve,10.0.0.2,serve", "the name is serve, which is reserved by Ansible or a group: choose another, such as serve1"),
        ("llm1,10.0.0.2,gpu", "it is in gpu, and gpus is empty: write how many GPUs it has, such as 8"),
        ("llm1,10.0.0.2,serve vllm", "it is in vllm, and gpus is empty"),
        ("llm1,10.0.0.2,serve vllm", "gpu_memory is empty: write the memory of each GPU, such as 80G"),
        ("llm1,10.0.0.2,serve,S1:2T", "the disk 'S1:2T' is not SERIAL:SIZE:PURPOSE"),
        ("llm1,10.0.0.2,serve,S1:2T:date", "has the purpose 'date': did you mean data?"),
        ("llm1,10.0.0.2,train,S1:2T:audit", "is for audit, which only hosts in serve have: add the group"),
        ("llm1,10.0.0.2,serve,S1:big:data", "has the size 'big': write one such as 3.5T"),
        ("llm1,10.0.0.2,serve,{{x}}:2T:data", "which Ansible would evaluate: write plain text"),
    ],
)  # fmt: skip
def test_a_hosts_fault_is_named_with_its_line_and_the_way_out(rows: str, fault: str) -> None:
    assert fault in "\n".join(faults_of(rows))


def test_an_estate_without_a_control_node_is_refused() -> None:
    rows = table(b"name,address,groups\nllm1,10.0.0.1,serve\n", "hosts.csv")
    assert hosts(rows, GROUPS, "estate.internal")[1] == [
        "no host is in control: add it to the host that was bootstrapped from the medium"
    ]


def test_rules_of_the_check_refuse_an_edge_without_a_gateway(run: Run, tmp_path: Path) -> None:
    code, message = run("name,address,groups\nops1,10.0.0.1,control\nedge1,10.0.0.2,edge\n")
    assert code == 1
    assert "nothing was written:\n- edge1: it is in edge and not in serve" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--alert-mail", "a@x", "b@x", "mail.example.org:587"], "--alert-mail has 'mail.example.org:587': write ADDRESS:PORT"),
        (["--alert-webhook", "https://example.org/x"], "write a URL with an IP address"),
        (["--operators", "10.0.0.1/8"], "--operators is '10.0.0.1/8' (10.0.0.1/8 has host bits set)"),
        (["--backup", "sftp:backup@backup.example.org:/srv"], "write a folder, or sftp:USER@ADDRESS:/FOLDER"),
        (["--domain", "{{ x }}"], "--domain is '{{ x }}'"),
        (["--model", "{{ x }}"], "--model is '{{ x }}', which Ansible would evaluate"),
        (["--shared-address", "ask.example.org"], "--shared-address is 'ask.example.org': write an unused IP address"),
        ([], "a host is in prometheus, but its alerts reach no operator"),
        ([], "a host is in vllm, but there is no model: give --model NAME and --context TOKENS"),
        ([], "disks are encrypted by a key in an HSM: give --hsm-module PATH, or no disks"),
        ([], "llm1's disk for audit has no size: give --requests-per-day, or the size"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_refused(
    words: list[str], fault: str, run: Run, tmp_path: Path
) -> None:
    code, message = run(HOSTS, *words)
    assert code == 1
    assert fault in message
    assert not (tmp_path / "made").exists()


def test_addresses_that_move_between_edges_are_asked_for_and_set(run: Run, tmp_path: Path) -> None:
    edges = "".join(f"llm{number},10.0.0.{number},serve edge keepalived\n" for number in (2, 3))
    rows = f"name,address,groups\nops1,10.0.0.1,control\n{edges}"
    assert "no address moves between them: give --shared-address ADDRESS" in run(rows)[1]
    code, message = run(rows, "--shared-address", "10.0.0.100", "10.0.0.101")
    assert code == 0, message
    groups = yaml.safe_load((tmp_path / "made/hosts.yml").read_text())["all"]["children"]
    assert groups["keepalived"]["vars"] == {"keepalived_addresses": ["10.0.0.100", "10.0.0.101"]}


def test_a_disk_too_small_for_the_record_is_refused(run: Run) -> None:
    _, message = run(HOSTS.replace("S2::audit", "S2:10G:audit"), *FLAGS)
    need = new.audit_gib(50_000, 180)
    assert f"llm1's disk for audit has 10G, and 180 days of 50,000 requests a day need {need}G" in message


def test_the_volume_of_the_record_follows_from_measured_bytes() -> None:
    """docs/develop/figures.md: 65,000 records are a file of 64 MiB, and a head has 213 bytes; a request makes two records."""
    requests, days = 50_000, 180
    records = 2 * requests * days * (64 << 20) / 65_000
    heads = 5 * 365 * 1440 * 213
    assert new.audit_gib(requests, days) == pytest.approx((records + heads) / 0.85 / 2**30, abs=1)


@pytest.mark.parametrize("name", ["no", "on", "null", "1e3", "0x10", "12"])
def test_a_name_that_yaml_reads_as_another_thing_is_quoted(name: str) -> None:
    answers = new.Answers((Host(name, "10.0.0.1", ("control",)),))
    text = new.text(answers, GROUPS, 180, ["standard"])
    estate = yaml.safe_load(text)["all"]
    assert [*estate["hosts"]] == [*estate["children"]["control"]["hosts"]] == [name]


def test_a_group_of_the_features_table_is_offered_as_soon_as_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    rows = {
        "features": [
            {"role": "base", "hosts": "all", "group": "control"},
            {"role": "later", "hosts": "later"},
        ]
    }
    (tmp_path / "meta/features.yml").write_text(yaml.safe_dump(rows))
    for role in ("base", "later"):
        specification = tmp_path / "roles" / role / "meta/argument_specs.yml"
        specification.parent.mkdir(parents=True)
        specification.write_text("argument_specs: {main: {short_description: It comes later}}")
    described = new.groups_of(tmp_path)
    assert described["later"] == "It comes later"
    assert "# group later: It comes later" in commands.template(described)


def test_a_thousand_hosts_are_written() -> None:
    rows = "".join(f"llm{number},10.1.{number // 250}.{number % 250 + 1},serve\n" for number in range(1000))
    inventory, faults = hosts(
        table(f"name,address,groups\nops1,10.0.0.1,control\n{rows}".encode(), "hosts.csv"),
        GROUPS,
        "estate.internal",
    )
    assert faults == []
    text = new.text(new.Answers(tuple(inventory)), GROUPS, 180, ["standard"])
    assert len(yaml.load(text, yaml.CSafeLoader)["all"]["children"]["serve"]["hosts"]) == 1000


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[str]]:
    """Answers questions on a terminal; returns the questions."""

    def on_terminal(answers: list[str]) -> list[str]:
        remaining: Iterator[str] = iter(answers)
        questions: list[str] = []

        def question(text: str) -> str:
            questions.append(text)
            try:
                return next(remaining)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", question)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        return questions

    return on_terminal


def test_answers_on_a_terminal_make_the_same_inventory(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        ["ops1", "10.20.30.11", "", "", ""],
        ["llm1", "10.20.30.21", "serve vllm edge", "8", "NVIDIA A100-SXM4-80GB", "80G"],
        ["S1:2T:data S2::audit S3:10G:feedback"],
        ["gpu1", "10.20.30.31", "trains", "0", ""],  # is asked for again
        ["gpu1", "10.20.30.31", "train", "8", "", "", "S4:4T:data", ""],
    ]
    estate = ["10.20.10.0/24", "0", "50,000", "operators@example.org alerts@example.org 10.20.30.50:587"]
    estate += ["sftp:backup@10.20.30.60:/srv", "", "10.20.30.40:1792", "deepseek-v2.5", "8192"]
    answer(["", *(word for words in cells for word in words), *estate])
    assert commands.from_terminal(new.Answers(()), GROUPS) == new.Answers(
        hosts=tuple(hosts(table(HOSTS.encode(), "hosts.csv"), GROUPS, "estate.internal")[0]),
        operators=("10.20.10.0/24",),
        requests=50_000,
        mail=("operators@example.org", "alerts@example.org", "10.20.30.50:587"),
        backup="sftp:backup@10.20.30.60:/srv",
        hsm_module="/usr/lib/vendor/libpkcs11.so",
        hsm="10.20.30.40:1792",
        model="deepseek-v2.5",
        context=8192,
    )
    printed = capsys.readouterr().out
    assert "the group trains is unknown: did you mean train?" in printed
    assert "'0' is not a number above 0" in printed


def test_answers_that_end_early_leave_no_file(
    answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(["", "ops1"])
    assert cli.main(["inventory", "new", "--out", str(tmp_path / "hosts.yml")]) == 1
    assert "the input ended early, and nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "hosts.yml").exists()


def test_without_a_terminal_a_table_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert cli.main(["inventory", "new", "--out", str(tmp_path / "hosts.yml")]) == 1
    assert "standard input is not a terminal: give the hosts with --hosts FILE.csv" in capsys.readouterr().err


def test_a_fault_that_only_the_check_sees_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "faults", lambda *_: ["ops1: a rule of the check"])
    assert run(HOSTS, *FLAGS) == (1, "llmkeep: nothing was written:\n- ops1: a rule of the check\n")
    assert not (tmp_path / "made").exists()
