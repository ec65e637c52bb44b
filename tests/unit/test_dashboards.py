"""Laws of the dashboard: the file is what the code builds, and every panel asks for metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deltal.monitor.dashboards import dashboard_json
from deltal.monitor.metrics import metric_names

FILE = Path(__file__).parents[2] / "dashboards" / "deltal.json"
PANELS: list[dict[str, Any]] = json.loads(dashboard_json())["panels"]
CHARTS = [panel for panel in PANELS if panel["type"] != "row"]


def test_the_file_is_what_the_code_builds() -> None:
    assert FILE.read_text() == dashboard_json(), "run: python -m deltal.monitor.dashboards > dashboards/deltal.json"


def test_the_rows_are_the_promised_ones() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == ["Training", "Variance", "Rollout", "Queues and staleness", "Replay ledger", "Learner", "Health"]


@pytest.mark.parametrize("panel", CHARTS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_asks_for_metrics_that_exist(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 10
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "$datasource"
    for target in panel["targets"]:
        names = re.findall(r"\bdeltal_\w+", target["expr"])
        assert names
        assert set(names) <= metric_names()
        assert target["expr"].count('run="$run"') == len(names)
        assert target["expr"].count("(") == target["expr"].count(")")


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_data_source_and_run_can_be_chosen() -> None:
    variables = {found["name"]: found for found in json.loads(dashboard_json())["templating"]["list"]}
    assert set(variables) == {"datasource", "run"}
    (name,) = re.findall(r"deltal_\w+", variables["run"]["query"])
    assert name in metric_names()
