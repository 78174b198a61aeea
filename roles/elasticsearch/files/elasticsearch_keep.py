#!/usr/bin/python3
"""elasticsearch-keep run|check|restore: how long logs are kept, and the copy of them.

run: a new index for each stream whose newest one is old or large; a snapshot of all streams; snapshots beyond the newest
--snapshots are deleted, and so are those that failed before the newest whole one. If the snapshot is whole, indices that ended
more than --days ago are deleted; where indices take more than --budget-mb, those that ended more than 180 days ago go, oldest
first. A younger index, and the one that is written to, are never deleted.
check: prints `good` if the repository can be written and the newest snapshot is whole and younger than two days.
restore [SNAPSHOT]: brings streams back from this snapshot; without a name it lists those that are there, since the newest one may
have been taken after the loss. A stream that exists comes back beside it, as
NAME_restored: shippers make streams anew within seconds, and what they wrote since stays.
Exit 0: done. Exit 1: it says what is wrong, and what to do.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

REQUEST = ["/usr/local/lib/llmkeep/elasticsearch-request"]
REPOSITORY = "/_snapshot/llmkeep"
STREAMS = "logs-llmkeep.*"
DAY = 86400
FEWEST_DAYS = 180  # which law and guide ask for; no setting and no lack of space goes below
# With four streams a host and 30 days an index, 30 hosts have as many shards as a node takes (cluster.max_shards_per_node).
ROLLOVER = {"conditions": {"max_age": "30d", "max_primary_shard_size": "10gb", "min_docs": 1}}
WHOLE = "SUCCESS"
OLD_SNAPSHOT = 2 * DAY
SNAPSHOT_SECONDS = 6 * 3600
HISTORY = 15  # runs from whose sizes growth is taken
# Health that has every document. Its status is yellow already while a primary comes from a snapshot.
ALL_THERE = '"initializing_shards":0,.*"unassigned_primary_shards":0'


class Refused(Exception):
    """Elasticsearch did not do it; the message has its answer."""


def ask(method: str, path: str, body: Any = None, until: str = "^[1-4]", seconds: int = 60) -> Any:
    """JSON of a success that matches UNTIL within SECONDS; Elasticsearch says 503 while it starts.

    What is deleted may be gone already: the request is repeated where its answer was lost.
    """
    words = [*REQUEST, "--until", until, str(seconds), method, path]
    done = subprocess.run(
        words if body is None else [*words, "-"],
        input=None if body is None else json.dumps(body),
        capture_output=True,
        text=True,
        check=False,
    )
    success = ("2", "404") if method == "DELETE" else "2"
    if done.returncode != 0 or not done.stdout.startswith(success):
        raise Refused(f"{method} {path}: {(done.stdout + done.stderr).strip()}")
    return json.loads(done.stdout.partition(" ")[2])


def each(method: str, paths: Iterable[str], body: Any = None) -> None:
    """Ask for all of them, also after one that is refused."""
    problems: list[str] = []
    for path in paths:
        try:
            ask(method, path, body)
        except Refused as problem:
            problems.append(str(problem))
    if problems:
        raise Refused("\n".join(problems))


def streams() -> dict[str, list[str]]:
    """Names of the indices of each stream, the one that is written to last."""
    answer = ask("GET", f"/_data_stream/{STREAMS}")["data_streams"]
    return {stream["name"]: [index["index_name"] for index in stream["indices"]] for stream in answer}


def sizes() -> dict[str, int]:
    """Bytes that each index takes on the disk."""
    answer = ask("GET", f"/{STREAMS}/_stats/store,translog?level=indices")["indices"]
    return {
        name: index["total"]["store"]["size_in_bytes"] + index["total"]["translog"]["size_in_bytes"]
        for name, index in answer.items()
    }


def ended() -> dict[str, float]:
    """When each index that is written to no more got its successor, in seconds since 1970; no document in it is younger."""
    answer = ask("GET", f"/{STREAMS}/_settings?filter_path=*.settings.index.creation_date")
    began = {name: int(index["settings"]["index"]["creation_date"]) / 1000 for name, index in answer.items()}
    return {name: began[successor] for indices in streams().values() for name, successor in pairwise(indices)}


def roll_over() -> None:
    each("POST", [f"/{stream}/_rollover" for stream in streams()], ROLLOVER)


def snapshots(*states: str) -> list[dict[str, Any]]:
    """All in one of these states, oldest first; without any, those that are whole."""
    answer = ask("GET", f"{REPOSITORY}/_all?sort=start_time")["snapshots"]
    return [snapshot for snapshot in answer if snapshot["state"] in (states or (WHOLE,))]


def take_snapshot() -> None:
    ask("POST", f"{REPOSITORY}/_verify", seconds=0)
    name = datetime.fromtimestamp(time.time(), UTC).strftime("logs-%Y%m%d-%H%M%S")
    body = {"indices": STREAMS, "include_global_state": False, "feature_states": ["none"]}
    ask("PUT", f"{REPOSITORY}/{name}", body)
    done = '"state":"(SUCCESS|PARTIAL|FAILED|INCOMPATIBLE)"'
    [snapshot] = ask("GET", f"{REPOSITORY}/{name}", until=done, seconds=SNAPSHOT_SECONDS)["snapshots"]
    if snapshot["state"] != WHOLE:
        raise Refused(
            f"snapshot {name} is {snapshot['state']}: {json.dumps(snapshot['failures'])}. See `journalctl -u elasticsearch`"
        )


def delete_old_snapshots(keep: int) -> None:
    """Those beyond the newest ones, and ours that failed before the newest whole one, which has what they have."""
    there = snapshots(WHOLE, "PARTIAL", "FAILED")
    names = [snapshot["snapshot"] for snapshot in there]
    whole = [snapshot["snapshot"] for snapshot in there if snapshot["state"] == WHOLE]
    failed = [name for name in names[: names.index(whole[-1])] if name not in whole] if whole else []
    old = [*whole[:-keep], *filter(re.compile(r"logs-\d{8}-\d{6}").fullmatch, failed)]
    each("DELETE", [f"{REPOSITORY}/{name}" for name in old])


def expired(
    ends: dict[str, float], size: dict[str, int], now: float, days: int, budget: int
) -> dict[str, str]:
    """Indices to delete, oldest first, and why; ENDS has no index that is written to."""
    reasons: dict[str, str] = {}
    left = sum(size.values())
    for name, end in sorted(ends.items(), key=lambda index: index[1]):
        age = (now - end) / DAY
        if age <= max(days, FEWEST_DAYS) and (age <= FEWEST_DAYS or left <= budget):
            continue
        reasons[name] = f"kept for {days} days" if age > days else f"indices take {left} bytes of {budget}"
        left -= size.get(name, 0)
    return reasons


def reached(history: list[list[float]], budget: int) -> float | None:
    """When indices take BUDGET bytes if they grow as between the first and last of [seconds, bytes]; None if they do not."""
    (first, before), (last, after) = history[0], history[-1]
    if after >= budget:
        return last
    if last - first < DAY or after <= before:
        return None
    return last + (budget - after) * (last - first) / (after - before)


def known(path: Path) -> dict[str, Any]:
    """What the last run left; one whose host lost power may have left nothing that can be read."""
    try:
        return {"sizes": [], **json.loads(path.read_text())}
    except (OSError, ValueError, TypeError):
        return {"sizes": []}


def run(options: argparse.Namespace) -> list[str]:
    """Everything that a night needs; what failed keeps no other step from running, but no index goes without a snapshot."""
    problems: list[str] = []
    budget = options.budget_mb << 20
    state = known(options.state)

    def attempt(step: Any, *arguments: Any) -> bool:
        try:
            step(*arguments)
        except Refused as problem:
            problems.append(str(problem))
            return False
        return True

    def expire() -> None:
        for name, why in expired(ended(), sizes(), time.time(), options.days, budget).items():
            if attempt(ask, "DELETE", f"/{name}"):
                print(f"deleted {name}: {why}", flush=True)

    def measure() -> None:
        taken = sum(sizes().values())
        state["sizes"] = [*state["sizes"], [time.time(), taken]][-HISTORY:]
        state["full"] = reached(state["sizes"], budget)
        if taken > budget:
            problems.append(
                f"indices take {taken} bytes of {budget}, and none of them ended more than {FEWEST_DAYS} days ago, so nothing "
                "more is deleted: enlarge the volume and elasticsearch_data_gb"
                if whole
                else f"indices take {taken} bytes of {budget}, and without a whole snapshot nothing is deleted"
            )

    attempt(roll_over)
    whole = attempt(take_snapshot)
    attempt(delete_old_snapshots, options.snapshots)
    if whole:
        state["snapshot"] = time.time()
        attempt(expire)
    attempt(measure)
    fresh = options.state.with_suffix(".new")
    with fresh.open("w") as file:
        file.write(json.dumps(state))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(options.state)
    return problems


def check(options: argparse.Namespace) -> list[str]:
    """What is wrong with the newest snapshot; waits --wait seconds for the first one."""
    ask("POST", f"{REPOSITORY}/_verify", seconds=0)
    end = time.monotonic() + options.wait
    while not (whole := snapshots()) and time.monotonic() < end:
        time.sleep(0.5)
    if not whole:
        return ["there is no whole snapshot: see `journalctl -u llmkeep-logs-keep`"]
    age = time.time() - whole[-1]["end_time_in_millis"] / 1000
    if age > OLD_SNAPSHOT:
        return [
            f"the newest whole snapshot is {age / DAY:.1f} days old: see `journalctl -u llmkeep-logs-keep`"
        ]
    print("good")
    return []


def restore(options: argparse.Namespace) -> list[str]:
    whole = {snapshot["snapshot"]: snapshot for snapshot in snapshots()}
    chosen = options.snapshot
    if chosen not in whole:
        named = [
            f"{name}: {len(s['data_streams'])} streams, {len(s['indices'])} indices"
            for name, s in whole.items()
        ]
        return [
            "name one of these snapshots, the newest from before the loss:",
            *(named or ["there is none"]),
        ]
    there = streams()
    beside = [name for name in whole[chosen]["data_streams"] if name in there]
    gone = [name for name in whole[chosen]["data_streams"] if name not in there]
    for names, more in (gone, {}), (beside, {"rename_pattern": "(.+)", "rename_replacement": "$1_restored"}):
        if not names:
            continue
        body = {"indices": ",".join(names), "include_global_state": False, "feature_states": ["none"], **more}
        ask("POST", f"{REPOSITORY}/{chosen}/_restore", body)
        for name in names:
            now = f"{name}_restored" if more else name
            print(f"{name} from {chosen} as {now}")
            ask("GET", f"/_cluster/health/{now}", until=ALL_THERE, seconds=3600)
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("run")
    verb.add_argument("--days", type=int, required=True)
    verb.add_argument("--snapshots", type=int, required=True)
    verb.add_argument("--budget-mb", type=int, required=True)
    verb.add_argument("--state", type=Path, default=Path("/var/lib/llmkeep-logs/kept.json"))
    verb.set_defaults(verb=run)
    verb = verbs.add_parser("check")
    verb.add_argument("--wait", type=float, default=0)
    verb.set_defaults(verb=check)
    verb = verbs.add_parser("restore")
    verb.add_argument("snapshot", nargs="?")
    verb.set_defaults(verb=restore)
    options = parser.parse_args()
    try:
        problems = options.verb(options)
    except Refused as refused:
        problems = [str(refused)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
