"""Data of serving hosts about an experiment, to be judged on the control node: outcomes, and models of the inventory.

A playbook collects the output of `llm-serve feedback outcomes`, run as the gateways' user. It is kept in memory, and
judged only if all serving hosts answered: always-valid intervals hold for figures that grow, not for the hosts that
happened to answer.
"""

import argparse
import gzip
import json
import sys
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path

from llmkeep import durable, source_tree
from llmkeep.errors import LlmkeepError
from llmkeep.experiments import outcomes
from llmkeep.experiments.definition import Experiment
from llmkeep.experiments.ladder import Evidence
from llmkeep.experiments.outcomes import Seen
from llmkeep.playbooks import inventory_path, memory, play
from llmkeep.record.runs import recorded

USER = "llm-gateway"
PROGRAM = "/usr/local/bin/llm-serve"
JOURNAL = "/var/lib/llm-feedback"
MEMORY = "/run"
MOST_BYTES = 128 << 20  # of one host: 1.5 million lines
MODELS = "List the models of the inventory"
QUOTED = 200


def collect(arguments: argparse.Namespace, experiment: Experiment, run: str) -> Evidence:
    """Outcomes of the run with this id, as a recorded run; raises LlmkeepError if a host does not deliver all of them."""
    tree = source_tree.located()
    playbook = (tree / "playbooks/outcomes.yml").resolve()
    places = [inventory_path(place, tree) for place in arguments.inventory]
    event: dict[str, object] = {
        "event.action": f"experiment outcomes {experiment.name}",
        "event.type": ["info"],
        "llmkeep.experiment.name": experiment.name,
    }
    print(f"asking the hosts in [serve] for their outcomes of {experiment.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir=memory()) as folder:
        asked = {
            "outcomes_user": USER,
            "outcomes_program": PROGRAM,
            "outcomes_journal": JOURNAL,
            "outcomes_memory": MEMORY,
            "outcomes_bytes": MOST_BYTES,
            "outcomes_experiment": experiment.name,
            "outcomes_run": run,
            "outcomes_metrics": [metric.name for metric in experiment.metrics],
            "outcomes_into": folder,
        }
        with recorded(tree, playbook, places, arguments, event) as outcome:
            outcome.code, results = play(
                playbook,
                places,
                ["--extra-vars", json.dumps(asked)],
                quiet=True,
                asked=frozenset({MODELS}),
                most_bytes=MOST_BYTES + (1 << 20),  # gzip makes no file longer by more
            )
            outcome.hosts = results.hosts
        if outcome.code == 130:
            raise SystemExit(130)
        away = {failure.partition(":")[0]: failure for failure in results.failures}
        by_rung: dict[int, Seen] = defaultdict(Seen)
        for host in sorted(str(each["host.name"]) for each in results.hosts):
            if host in away:
                continue
            path = Path(folder, f"{host}.gz")
            try:
                outcomes.add(by_rung, whole(path), host, experiment)
            except LlmkeepError as error:
                away[host] = str(error)
            path.unlink(missing_ok=True)
    if not away and (outcome.code or not results.hosts):
        away[""] = "; ".join(results.complaints) or f"no host is in [serve] of {', '.join(map(str, places))}"
    if away:
        listed = "\n".join(f"- {each}" for each in away.values())
        raise LlmkeepError(
            f"there is no verdict on {experiment.name}, since not all serving hosts delivered their outcomes:\n{listed}\n"
            "The intervals hold only for all hosts. Run this again when all answer, or remove a permanently lost host "
            "from [serve]"
        )
    return Evidence(by_rung, {host: json.loads(text) for (_, host), text in results.outputs.items()})


def whole(archive: Path) -> list[bytes]:
    """The lines that a host printed, whose last one is their number; raises LlmkeepError for incomplete or other output."""
    host = archive.stem
    try:
        with gzip.open(archive) as file:
            data = file.read(MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise LlmkeepError(f"{host} returned an invalid answer ({error!r}): look at it") from error
    if len(data) == MOST_BYTES:
        raise LlmkeepError(
            f"{host} prints {MOST_BYTES >> 20} MiB or more, which is too much to judge: examine that host"
        )
    lines = data.splitlines()
    last = lines.pop() if lines else b""
    if last != b'{"lines":%d}' % len(lines):
        raise LlmkeepError(f"{host} returned an incomplete answer; its last line is {last[:QUOTED]!r}")
    return lines


def publish(arguments: argparse.Namespace, path: Path, text: str) -> int:
    """Publish a verdict on the pages of product owners, like `llmkeep site --tags operator_page`; returns the exit code."""
    tree = source_tree.located()
    site = (tree / "site.yml").resolve()
    places = [inventory_path(place, tree) for place in arguments.inventory]
    durable.write(path, f"{text}\n".encode(), 0o644)
    print(f"publishing {path} with role operator_page", file=sys.stderr)
    tagged = argparse.Namespace(**vars(arguments) | {"tags": "operator_page"})
    with recorded(tree, site, places, tagged) as outcome:
        outcome.code, results = play(site, places, ["--tags", "operator_page"], quiet=True)
        outcome.hosts = results.hosts
    state = (
        "on the pages" if outcome.code == 0 else "not on all pages: run `llmkeep site --tags operator_page`"
    )
    for each in [f"{path} is {state}", *results.failures]:
        print(each, file=sys.stderr)
    return outcome.code
