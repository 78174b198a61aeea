"""`llmkeep inventory check --graph`: flows by the roles' own firewall rules, and their drawing."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from llmkeep import cli
from llmkeep.inventory import flows, graph, rules
from llmkeep.inventory.flows import Box, Estate, Flow
from llmkeep.playbooks import listed

TREE = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"
FEATURES: list[dict[str, object]] = [
    {"role": "edge", "hosts": "edge", "needs": {"serve": "an edge reaches its gateway over a UNIX socket"}}
]


def table() -> set[str]:
    """Variables, roles and ports of the table in docs/operate/estate.md."""
    text = (TREE / "docs/operate/estate.md").read_text().partition("## Ports")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|")[:3] for line in text.splitlines() if line.startswith("|")]
    return {word.strip(" `") for row in cells for cell in row for word in cell.split(",")}


def reached(estate: Estate, label: str) -> list[tuple[list[str], list[str]]]:
    """Titles of sources and targets of the flows of a variable or role."""
    return [
        ([box.title for box in flow.sources], [box.title for box in flow.targets])
        for flow in estate.flows
        if flow.label == label
    ]


@pytest.fixture(scope="module")
def lab() -> Estate:
    names = ("lab", "lab-edges", "lab-logs", "lab-train")
    return flows.estate(listed([TREE / "inventory" / name for name in names], TREE))


@pytest.fixture(scope="module")
def example() -> Estate:
    return flows.estate(listed([TREE / "inventory/example"], TREE))


def test_flows_of_the_lab_come_from_its_rules(lab: Estate) -> None:
    assert reached(lab, "edge_port") == [(["clients", "ops1"], ["ops1", "llm1"])]
    assert reached(lab, "engine_access_port") == [(["ops1", "llm1"], ["llm1", "llm2"])]
    assert reached(lab, "redis_tls_port") == [(["llm1"], ["ops1"])]
    assert reached(lab, "elasticsearch_port") == [(["llm1"], ["ops1"])]
    assert reached(lab, "exporters_port") == [(["ops1"], ["llm1", "llm2", "train1", "train2"])]
    assert reached(lab, "mirror_port") == [(["lab_seat", "llm1", "llm2", "train1", "train2"], ["ops1"])]
    # llm1 has edge_key_source: file, and ops1 is itself the HSM.
    assert reached(lab, "hsm_port") == [(["train1", "train2"], ["ops1"])]
    assert reached(lab, "keepalived") == [(["ops1", "llm1"], ["ops1", "llm1"])]


def test_machines_outside_are_named_by_the_variable_that_has_their_address(example: Estate) -> None:
    outside = {(box.title, box.address) for box in example.boxes if not box.groups}
    assert outside == {
        ("base_ssh_from", "10.20.10.0/24"),
        ("prometheus_mail", "10.20.30.50"),
        ("backup_repository", "10.20.30.60"),
        ("base_open_out", "10.20.30.40"),
        ("clients", ""),
    }


def test_every_rule_can_be_known_without_a_host_and_is_in_the_table_of_ports(
    lab: Estate, example: Estate
) -> None:
    for estate in (lab, example):
        assert estate.unread == ()
        assert {flow.label for flow in estate.flows} <= table()


def test_every_template_of_rules_is_reached_from_its_roles_tasks() -> None:
    reachable = set()
    for role in (TREE / "roles").iterdir():
        tasks = {path.name: yaml.safe_load(path.read_text()) for path in role.glob("tasks/*.yml")}
        for file, _ in rules.rule_files(tasks, tasks.get("main.yml")):
            reachable.add(role / "templates" / file["template"])
    assert reachable == {*(TREE / "roles").glob("*/templates/*nft*.j2")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ip daddr 10.0.0.1 tcp dport 8443 accept", [("out", "10.0.0.1", "8443/tcp")]),
        ("ip6 saddr 2001:db8::1 udp dport 123 accept", [("in", "2001:db8::1", "123/udp")]),
        ("tcp dport 443 accept", [("in", "", "443/tcp")]),
        (
            "ip daddr 10.0.0.1 tcp dport { 29400, 32768-60999 } rt ipsec exists meta skuid x accept",
            [("out", "10.0.0.1", "29400, 32768-60999/tcp")],
        ),
        ("ip saddr 10.0.0.1 meta l4proto esp accept", [("in", "10.0.0.1", "IP protocol esp")]),
        ("ip daddr 10.0.0.1 tcp sport 22 tcp flags & syn == 0 accept", []),
        ("tcp dport 443 add @edge { ip saddr } counter name refused_in drop", []),
        ("ct state established,related accept", []),
    ],
)
def test_a_rule_that_accepts_new_connections_is_read(line: str, expected: list[tuple[str, ...]]) -> None:
    assert [*rules.accepted(line, "/etc/nftables.d/input-x.nft")] == expected


def drawn(estate: Estate) -> ElementTree.Element:
    return ElementTree.fromstring(graph.svg(estate, FEATURES, "Estate"))  # noqa: S314 - our own


def line_of_hosts(count: int) -> Estate:
    """An estate whose hosts all reach the first one."""
    boxes = tuple(Box(f"h{number}", f"10.0.0.{number}", ("serve", "edge")) for number in range(count))
    flow = Flow("8443/tcp", "mirror_port", boxes[1:], boxes[:1])
    return Estate(
        (*boxes, Box("clients")), (flow, Flow("443/tcp", "edge_port", (Box("clients"),), boxes)), ()
    )


@pytest.mark.parametrize("count", [2, 5, 12])
def test_each_host_is_a_box_and_each_end_of_a_flow_is_marked(count: int) -> None:
    drawing = drawn(line_of_hosts(count))
    boxes = drawing.findall(f"{SVG}rect")[1:]
    assert len(boxes) == count + 1
    tops = [int(box.attrib["y"]) for box in boxes]
    bottoms = [top + int(box.attrib["height"]) for top, box in zip(tops, boxes, strict=True)]
    assert all(bottom < top for bottom, top in zip(bottoms, tops[1:], strict=False)), "boxes overlap"
    assert len(drawing.findall(f"{SVG}circle")) == count - 1 + 1
    assert len(drawing.findall(f"{SVG}path")) == 1 + count
    words = [text.text for text in drawing.findall(f"{SVG}text")]
    assert {"h0 10.0.0.0", "serve, edge", "443/tcp edge_port", "8443/tcp mirror_port"} <= {*words}
    assert "Within a host in edge and serve: an edge reaches its gateway over a UNIX socket." in words


def test_text_is_escaped_and_the_same_estate_gives_the_same_bytes() -> None:
    box = Box("<script>alert('&')</script>\x1b", '"10.0.0.1"', ("serve",))
    estate = Estate((box,), (), ("a rule & <b>",))
    text = graph.svg(estate, FEATURES, "</title><script>")
    assert "<script" not in text
    assert "\x1b" not in text
    assert text == graph.svg(estate, FEATURES, "</title><script>")


def test_many_hosts_with_equal_groups_are_one_box_with_their_number() -> None:
    hosts = [f"llm{number}" for number in range(30)]
    addresses = {host: {"ansible_host": f"10.0.1.{number + 1}"} for number, host in enumerate(hosts)}
    listing: dict[str, Any] = {
        "all": {"children": ["control", "mirror", "serve", "ungrouped"]},
        "control": {"hosts": ["ops1"]},
        "mirror": {"hosts": ["ops1"]},
        "serve": {"hosts": hosts},
        "_meta": {"hostvars": {"ops1": {"ansible_host": "10.0.0.1"}, **addresses}},
    }
    estate = flows.estate(listing)
    assert [box.title for box in estate.boxes] == ["ops1", "llm0 to llm29: 30 hosts"]
    assert reached(estate, "mirror_port") == [(["llm0 to llm29: 30 hosts"], ["ops1"])]


def test_the_command_draws_an_inventory_without_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = tmp_path / "estate.svg"
    words = ["inventory", "check", "-i", str(TREE / "inventory/example"), "--graph", str(drawing)]
    assert cli.main(words) == 0
    assert "no fault found" in capsys.readouterr().out
    titles = [text.text or "" for text in ElementTree.parse(drawing).iter(f"{SVG}text")]  # noqa: S314 - our own
    assert "llm1 10.20.30.21" in titles
    assert "443/tcp edge_port" in titles


def test_an_inventory_with_a_fault_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts.yml").write_text("all: {hosts: {a: {ansible_host: 10.0.0.1}}}\n")
    drawing = tmp_path / "estate.svg"
    assert cli.main(["inventory", "check", "-i", str(tmp_path / "hosts.yml"), "--graph", str(drawing)]) == 1
    assert "the group control is empty" in capsys.readouterr().out
    assert not drawing.exists()
