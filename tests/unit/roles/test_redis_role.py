"""How many gateways a shared Redis serves, and with how much memory."""

from pathlib import Path

import pytest
from rendered_role import rendered


@pytest.mark.parametrize(
    ("serving", "connections", "memory"), [(0, 512, 448), (50, 512, 448), (1000, 8000, 916)]
)
def test_a_redis_has_connections_and_memory_for_the_gateways_of_every_host(
    tmp_path: Path, serving: int, connections: int, memory: int
) -> None:
    clients = {f"llm{number}.estate.internal": "10.0.0.2" for number in range(serving)}
    made = rendered(
        tmp_path,
        "redis",
        {name: f"lookup('ansible.builtin.template', '{name}.conf.j2')" for name in ("redis", "hardening")},
        "ops1",
        {"ops1.estate.internal": "10.0.0.1"} | clients,
        {"__redis_exporter_password": {"sha256": ""}},
        {"redis": ["ops1"], "serve": [name.split(".")[0] for name in clients]},
    )
    assert f"\nmaxclients {connections}\n" in made["redis"]
    assert f"\nMemoryMax={memory}M\n" in made["hardening"] + "\n"
