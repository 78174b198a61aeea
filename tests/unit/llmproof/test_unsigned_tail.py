"""A tail without a signed head can be forged: how long it may grow is one number in code, role, manifest and documents."""

import re

import pytest
import yaml
from plugin_modules import ROOT

from llmproof.chain import UNSIGNED_SECONDS
from llmproof.service import HEAD_SECONDS

ROLE = ROOT / "roles/llm_serving"


def test_a_head_may_come_late_once_and_no_more() -> None:
    assert UNSIGNED_SECONDS == 2 * HEAD_SECONDS


def test_hosts_and_replicas_promise_the_same() -> None:
    specs = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())
    promised = [
        yaml.safe_load((ROLE / "defaults/main.yml").read_text())["llm_serving_unsigned_seconds"],
        specs["argument_specs"]["main"]["options"]["llm_serving_unsigned_seconds"]["default"],
    ]
    manifest = (ROOT / "deploy/kubernetes/serving/statefulset.yaml").read_text()
    promised += re.findall(r'LLM_AUDIT_UNSIGNED_SECONDS, value: "(\d+)"', manifest)
    assert [*map(float, promised)] == [UNSIGNED_SECONDS] * 3


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("audit-record.md", "after `llm_serving_unsigned_seconds` ({:.0f}) the writer refuses"),
        ("audit-record.md", "been without a head for `llm_serving_unsigned_seconds` ({:.0f})"),
        ("threat-model.md", "forge a tail of up to {:.0f} s"),
    ],
)
def test_the_documents_state_it(page: str, sentence: str) -> None:
    text = " ".join((ROOT / "docs/audit" / page).read_text().split())
    assert sentence.format(UNSIGNED_SECONDS) in text
