"""What Kibana asks Elasticsearch for the panels of roles/kibana/files/dashboards, in the search API's words.

Kibana's own translation is in its browser code, which no test here runs: this is ours, of the operations that the dashboards use.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from plugin_modules import ROOT

DASHBOARDS = sorted((ROOT / "roles/kibana/files/dashboards").glob("*.json"))
STATISTICS = {"unique_count": "cardinality", "average": "avg", "max": "max", "min": "min", "sum": "sum"}


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def layers(
    config: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]]:
    """Data source, buckets from the outermost inwards, and metrics of each layer of a visualization."""
    if config["type"] == "xy":
        for layer in config["layers"]:
            yield (
                layer["data_source"],
                [layer[name] for name in ("breakdown_by", "x") if name in layer],
                layer["y"],
            )
    else:
        yield config["data_source"], config.get("rows", []), config["metrics"]


def metric(column: dict[str, Any]) -> dict[str, Any]:
    """The aggregation of a metric; none for a count, which each bucket has."""
    operation = column["operation"]
    if operation == "count":
        return {}
    if operation == "percentile":
        return {"percentiles": {"field": column["field"], "percents": [column["percentile"]]}}
    return {STATISTICS[operation]: {"field": column["field"]}}


def bucket(column: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    if column["operation"] == "date_histogram":
        return {"date_histogram": {"field": column["field"], "fixed_interval": "1h", "min_doc_count": 1}}
    (field,) = column["fields"]
    rank = column["rank_by"]
    assert metrics[rank["metric_index"]]["operation"] == "count", "ranked by another metric than a count"
    return {"terms": {"field": field, "size": column["limit"], "order": {"_count": rank["direction"]}}}


def aggregations(buckets: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    if buckets:
        inner = aggregations(buckets[1:], metrics)
        return {"bucket": bucket(buckets[0], metrics) | ({"aggs": inner} if inner else {})}
    return {f"metric {number}": found for number, column in enumerate(metrics) if (found := metric(column))}


def searches(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Title of a panel, pattern of its streams, and body of the search, for each layer of each panel of a dashboard."""
    for panel in dashboard(path)["panels"]:
        config = panel["config"]
        assert config["query"]["language"] == "lucene"
        for source, buckets, metrics in layers(config):
            body = {
                "size": 0,
                "track_total_hits": True,
                "query": {"query_string": {"query": config["query"]["expression"]}},
                "aggs": aggregations(buckets, metrics),
            }
            yield f"{path.stem}: {config['title']}", source["index_pattern"], body


def bulk(documents: Iterable[dict[str, Any]], now: str) -> str:
    """Body of _bulk that creates the documents that Filebeat made, in the streams that it would have put them in, as of NOW."""
    lines: list[dict[str, Any]] = []
    for found in documents:
        stream = found.pop("data_stream") | {"namespace": "cases"}
        found.pop("@metadata", None)
        lines.append({"create": {"_index": f"logs-{stream['dataset']}-cases"}})
        lines.append(
            found | {"@timestamp": now, "host": {"name": "cases.estate.internal"}, "data_stream": stream}
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


def msearch() -> tuple[list[str], str]:
    """Names of all panels, and the body of _msearch that has a search of each."""
    asked = [found for path in DASHBOARDS for found in searches(path)]
    lines = [line for _, pattern, body in asked for line in ({"index": pattern}, body)]
    return [name for name, _, _ in asked], "".join(json.dumps(line) + "\n" for line in lines)


def nothing_in(answer: dict[str, Any]) -> list[str]:
    """What of an answer found nothing: hits, buckets, values."""
    if "error" in answer:
        return [json.dumps(answer["error"])[:500]]
    if answer["_shards"]["failed"]:
        return [f"shards failed: {json.dumps(answer['_shards'])[:500]}"]
    found = [] if answer["hits"]["total"]["value"] else ["no document"]
    return found + list(empty(answer.get("aggregations", {}), ""))


def empty(aggs: dict[str, Any], where: str) -> Iterator[str]:
    """Aggregations that have no bucket or no value anywhere."""
    for name, found in aggs.items():
        if not isinstance(found, dict):
            continue
        if "buckets" in found:
            within = [list(empty(each, f"{where}{name} > ")) for each in found["buckets"]]
            # In one of the buckets, at least, each metric has a value.
            yield from min(within, key=len, default=[f"{where}{name} has no bucket"])
        elif "values" in found and None in found["values"].values():
            yield f"{where}{name} has no value"
        elif "value" in found and not found["value"]:
            yield f"{where}{name} is {found['value']}"
