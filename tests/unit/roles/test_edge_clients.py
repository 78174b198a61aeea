"""Who may connect to an edge, by the role's own firewall rules."""

from pathlib import Path

import pytest
from rendered_role import content, rendered

HOSTS = {"llm1.estate.internal": "10.0.0.12", "ops1.estate.internal": "10.0.0.11"}
GROUPS = {"control": ["ops1"], "serve": ["llm1"], "edge": ["llm1"], "prometheus": ["ops1"]}


@pytest.mark.parametrize(
    ("clients", "accepted"),
    [
        ([], ["tcp dport 443 accept"]),
        (
            ["10.9.0.0/16"],
            ["ip saddr 10.9.0.0/16 tcp dport 443 accept", "ip saddr 10.0.0.11 tcp dport 443 accept"],
        ),
    ],
)
def test_where_clients_are_named_prometheus_is_let_in_too(
    clients: list[str], accepted: list[str], tmp_path: Path
) -> None:
    given = {"edge_clients": clients, "estate_name": "llm1.estate.internal", "llm_serving_gateways": 1}
    made = rendered(tmp_path, "edge", {}, "llm1", HOSTS, given, GROUPS, configured=True)
    rules = content(made, "/input-edge.nft").splitlines()
    assert [line for line in rules if line.endswith(" accept")] == accepted
