"""Elastic's own packages, Kibana's among them: on a machine that reaches Elastic's repository (`make storm`)."""

import os

import pytest
from estate import ROOT, Lab

INVENTORIES = "-i inventory/lab -i inventory/lab-logs -i inventory/lab-kibana"
PACKAGES = "-e elasticsearch_source=package -e filebeat_source=package -e kibana_source=package -e kibana_memory_mb=1024"


@pytest.mark.skipif("STORM" not in os.environ, reason="a campaign: make storm")
def test_kibana_shows_the_dashboards_of_git(estate: Lab) -> None:
    if not list((ROOT / ".lab/bundle/apt").rglob("kibana_*.deb")):
        pytest.skip(
            "the bundle has no package kibana, which Elastic's repository alone has: on a machine that reaches it, put its "
            "key into artifacts.d/keys, have profile lab include profile elastic, run `llmkeep lock update` and build the bundle"
        )
    estate.on(
        "ops1", f"llmkeep site {INVENTORIES} {PACKAGES} --tags elasticsearch,filebeat,kibana", timeout=1800
    )
    folder = "/usr/local/share/llmkeep/dashboards"
    assert estate.on("llm1", f"/usr/local/lib/llmkeep/kibana-dashboards {folder} check").strip() == ""
