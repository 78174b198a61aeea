"""The audit record where a power cut takes what was not flushed."""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from estate import Client, Lab, answers, request, within

pytestmark = pytest.mark.leaves_it_whole
RECORDS = "/var/log/llm-audit"
VERIFY = "llm-serve audit verify --json"


def test_the_record_survives_a_power_cut_under_load_and_shows_every_edit(estate: Lab, client: Client) -> None:
    def ask(number: int) -> str | None:
        """The request's id, if it was answered."""
        try:
            status, _ = request(client, "POST", "/generate", {"prompt": f"number {number}", "max_tokens": 2})
        except (OSError, http.client.HTTPException):
            return None
        return str(number) if status == 200 else None

    answers(client, seconds=240)  # the model is loaded after each boot
    pool = ThreadPoolExecutor(4)
    asked = [pool.submit(ask, number) for number in range(40)]
    time.sleep(4)
    within(120, "one is answered", lambda: any(each.done() and each.result() for each in asked))
    estate.run("power-off", "llm1")
    pool.shutdown(wait=False, cancel_futures=True)
    # What was on its way is here by then; who still waits hears nothing more, and would wait for two minutes.
    done, _ = wait([each for each in asked if not each.cancelled()], timeout=10)
    answered = sum(each.result() is not None for each in done)
    estate.run("power-on", "llm1")
    answers(client, seconds=240)
    report = json.loads(estate.on("llm1", VERIFY))
    assert report["ok"], report
    intents = estate.on("llm1", f"cat {RECORDS}/records-*.jsonl | grep -c '\"intent\"'")
    assert answered
    assert int(intents) >= answered
    copy = f"rm -rf /tmp/edited && cp -r {RECORDS} /tmp/edited"
    edit = 'sed -i \'3s/timestamp":"2/timestamp":"3/\' /tmp/edited/records-*.jsonl'
    cut = "sed -i '5d' /tmp/edited/records-*.jsonl"
    for change in edit, cut:
        exits = estate.on("llm1", f"{copy} && {change} && {VERIFY} /tmp/edited > /dev/null; echo $?")
        assert exits.strip() == "3", change
    estate.on("llm1", "rm -r /tmp/edited")
    # A witness that came while llm1 was away has its own line behind it.
    run = estate.on(
        "ops1", "llmkeep audit show | grep 'run site.yml'; llmkeep audit verify > /dev/null; echo $?"
    )
    assert "run site.yml" in run
    assert run.strip().endswith("0")
