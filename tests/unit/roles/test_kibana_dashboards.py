"""Dashboards of role kibana: of the API's form, on fields that documents have, and compared with what Kibana has."""

import copy
import itertools
import json
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard_searches import DASHBOARDS, dashboard, layers, nothing_in
from plugin_modules import ROOT

DOUBLE = ROOT / "tests/doubles/kibana"
SCHEMA = json.loads((DOUBLE / "dashboards-9.5.schema.json").read_text())
MAPPINGS = json.loads((ROOT / "roles/elasticsearch/files/ecs.json").read_text())
PROCESSORS = (ROOT / "roles/filebeat/files/processors.yml").read_text()
NUMBERS = {"long", "double", "date"}
each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def double() -> dict[str, Any]:
    return runpy.run_path(str(DOUBLE / "kibana.py"))


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "roles/kibana/files/kibana_dashboards.py"))


@each_dashboard
def test_it_is_of_the_form_of_the_api(path: Path, double: dict[str, Any]) -> None:
    assert double["fault"](dashboard(path), SCHEMA, SCHEMA) == ""


def panel(changed: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The first dashboard with one panel that was changed."""
    found = copy.deepcopy(dashboard(DASHBOARDS[0]))
    changed(found["panels"][0])
    return found


MUTANTS = {
    "a panel of an unknown type": panel(lambda panel: panel.update(type="lens")),
    "a panel without a place": panel(lambda panel: panel.pop("grid")),
    "a panel beyond the grid": panel(lambda panel: panel["grid"].update(w=49)),
    "a field of an older form": panel(lambda panel: panel["config"].update(dataset={})),
    "a query in another language": panel(lambda panel: panel["config"]["query"].update(language="esql")),
    "an operation that is none": panel(lambda panel: panel["config"]["metrics"][0].update(operation="avg")),
    "no title": dashboard(DASHBOARDS[0]) | {"title": ""},
    "no panel": dashboard(DASHBOARDS[0]) | {"panels": []},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_another_form_is_refused(mutant: str, double: dict[str, Any]) -> None:
    assert double["fault"](MUTANTS[mutant], SCHEMA, SCHEMA)


@each_dashboard
def test_panels_do_not_overlap(path: Path) -> None:
    places = [found["grid"] for found in dashboard(path)["panels"]]
    assert all(place["x"] + place["w"] <= 48 for place in places)
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, f"{one} and {other}"


def mapped(name: str) -> str:
    """The type that the index template gives a field; a string's is the dynamic template's, keyword."""
    found: dict[str, Any] = MAPPINGS
    for part in name.split("."):
        found = found.get("properties", {}).get(part, {})
    return str(found.get("type", "keyword"))


def used(path: Path) -> Iterator[tuple[str, str]]:
    """Fields of a dashboard, each with what is done with it."""
    for found in dashboard(path)["panels"]:
        config = found["config"]
        for name in re.findall(r"_exists_:([\w.@]+)|(?<![\w.])([a-z_.]+):", config["query"]["expression"]):
            yield name[0] or name[1], "query"
        for _, buckets, metrics in layers(config):
            for column in buckets + metrics:
                names = column.get("fields") or [column["field"]] if column["operation"] != "count" else []
                yield from ((name, column["operation"]) for name in names)


@each_dashboard
def test_its_fields_are_documents_fields_and_of_a_type_that_fits(path: Path) -> None:
    # Whole names, so that `event.out` is none; what Filebeat adds by itself or by the role's template is named here.
    words = set(re.findall(r"[\w.@]+", PROCESSORS.replace("line.", "")))
    known = words | {
        "@timestamp",
        "host.name",
        "service.name",
        "nginx.seconds",
        "data_stream.dataset",
        "event.action",
        "event.outcome",
    }
    for name, operation in used(path):
        assert name in known, f"{name} is no field that Filebeat ships"
        kind = mapped(name)
        if operation == "date_histogram":
            assert kind == "date", name
        elif operation in ("percentile", "average", "sum", "max", "min"):
            assert kind in NUMBERS, f"{operation} of {name}, a {kind}"
        elif operation in ("terms", "unique_count"):
            assert kind in ("keyword", "long", "ip"), f"{operation} of {name}, a {kind}"


def test_an_answer_without_shards_documents_buckets_or_values_is_told() -> None:
    nothing = {
        "_shards": {"failed": 0},
        "hits": {"total": {"value": 0}},
        "aggregations": {"bucket": {"buckets": []}, "metric 1": {"value": None}},
    }
    assert nothing_in(nothing) == ["no document", "bucket has no bucket", "metric 1 is None"]
    assert nothing_in(nothing | {"_shards": {"failed": 1}}) == ['shards failed: {"failed": 1}']


def test_a_difference_names_the_field(program: dict[str, Any]) -> None:
    wanted = dashboard(DASHBOARDS[0])
    found = copy.deepcopy(wanted) | {"options": {"use_margins": True}}
    assert list(program["differences"](found, wanted, "")) == []
    found["panels"][2]["config"]["query"]["expression"] = "*"
    (line,) = program["differences"](found, wanted, "")
    assert line.startswith('panels[2].config.query.expression is "*", and git has "')
    found["panels"].pop()
    assert list(program["differences"](found, wanted, "")) == [
        f"panels has {len(wanted['panels']) - 1} entries, and git has {len(wanted['panels'])}"
    ]


def test_kibana_knows_each_setting() -> None:
    known = yaml.safe_load((DOUBLE / "settings-9.5.yml").read_text())
    names = {name for page in known.values() for name in page}
    role = yaml.safe_load((ROOT / "roles/kibana/vars/main.yml").read_text())
    assert role["__kibana_settings"].keys() | set(role["__kibana_keystore"].values()) <= names
