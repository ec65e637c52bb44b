"""The Grafana dashboard as code: `panels.py`'s rows of charts, built with Grafana's own SDK.

`dashboards/deltal.json` is what `dashboard_json()` gives (a test holds them equal); after a change write it anew:
`python -m deltal.monitor.dashboards > dashboards/deltal.json`.
"""

from __future__ import annotations

import itertools
import sys

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode, VisibilityMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh, VariableSort

from deltal.monitor.panels import ROWS, Chart

SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
PANEL_WIDTH, PANEL_HEIGHT = 8, 8
"""Of Grafana's 24 columns; three panels stand side by side."""


def dashboard_json() -> str:
    """The dashboard in Grafana's JSON, equal from call to call; ends with a newline."""
    built = (
        dashboard.Dashboard("deltal")
        .uid("deltal")
        .description("Reinforcement learning with verifiable rewards: one run of deltal")
        .tags(["deltal", "rlvr"])
        .refresh("5s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query("label_values(deltal_process_resident_memory_bytes, run)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_DESC)
        )
    )
    numbers = itertools.count(1)  # Grafana wants a different id for every row and panel
    for title, charts in ROWS.items():
        built.with_row(dashboard.Row(title).id(next(numbers)))
        for chart in charts:
            built.with_panel(_panel(chart, next(numbers)))
    text: str = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(built.build())
    return text + "\n"


def _panel(chart: Chart, number: int) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .id(number)
        .title(chart.title)
        .description(chart.description)
        .unit(chart.unit)
        .datasource(SOURCE)
        .span(PANEL_WIDTH)
        .height(PANEL_HEIGHT)
        .show_points(VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    for i, (legend, expression) in enumerate(chart.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + i)).range()
        panel.with_target(query.datasource(SOURCE))
    return panel


if __name__ == "__main__":
    sys.stdout.write(dashboard_json())
