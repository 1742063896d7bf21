"""How panels look: a query, a unit, what stands there where there is no data. Development only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SOURCE", "curves", "figure", "heat", "link", "marks", "now", "over_time", "rows"]

SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
_BAD = "red"
_REFS = "ABCDEFGHIJ"
_BAND_COLOUR, _ABOVE_COLOUR = "rgba(18, 128, 106, 0.35)", "rgba(232, 131, 58, 0.25)"


def now(expression: str) -> prometheus.Dataquery:
    """A query for the last value alone, one row a series."""
    return prometheus.Dataquery().expr(expression).instant().format(PromQueryFormat.TABLE)


def over_time(expression: str, legend: str) -> prometheus.Dataquery:
    """A query for the range shown, with the name of each series."""
    return prometheus.Dataquery().expr(expression).range().legend_format(legend)


def figure(
    panel: int,
    title: str,
    query: prometheus.Dataquery,
    unit: str,
    *,
    empty: str,
    bad_from: float | None = None,
    says: str = "",
    span: int = 4,
) -> stat.Panel:
    """One number; red from `bad_from` on."""
    return (
        stat.Panel()
        .id(panel).title(title).description(says).datasource(SOURCE)
        .unit(unit).no_value(empty).height(4).span(span)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(common.BigValueGraphMode.NONE)
        .thresholds(_thresholds((None, "text"), *([(bad_from, _BAD)] if bad_from is not None else [])))
        .color_mode(common.BigValueColorMode.VALUE)
        .with_target(query)
    )  # fmt: skip


def curves(
    panel: int,
    title: str,
    queries: Sequence[prometheus.Dataquery],
    unit: str,
    *,
    empty: str,
    says: str = "",
    log: bool = False,
    band: tuple[float, float] | None = None,
    bars: bool = False,
    dashed: str | None = None,
    span: int = 12,
) -> timeseries.Panel:
    """Series over time; `band` is drawn behind them, series whose name matches `dashed` so."""
    made = (
        timeseries.Panel()
        .id(panel).title(title).description(says).datasource(SOURCE)
        .unit(unit).no_value(empty).height(8).span(span)
        .show_points(common.VisibilityMode.NEVER).line_width(1).fill_opacity(0)
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .legend(
            common_builders.VizLegendOptions().show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )  # fmt: skip
    if log:
        scale = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10)
        made.scale_distribution(scale)
    if band is not None:
        made.min(0).axis_soft_max(2 * band[1])
        made.thresholds(
            _thresholds((None, "transparent"), (band[0], _BAND_COLOUR), (band[1], _ABOVE_COLOUR))
        )
        made.thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.AREA)
        )
    if bars:
        made.draw_style(common.GraphDrawStyle.BARS).fill_opacity(80).min(0)
    if dashed is not None:
        style = {"fill": "dash", "dash": [8, 6]}
        made.override_by_regexp(dashed, [models.DynamicConfigValue("custom.lineStyle", style)])
    for ref, query in zip(_REFS, queries, strict=False):
        made.with_target(query.ref_id(ref))
    return made


def heat(panel: int, title: str, query: prometheus.Dataquery, *, empty: str) -> heatmap.Panel:
    """A histogram over time."""
    return (
        heatmap.Panel()
        .id(panel).title(title).datasource(SOURCE).no_value(empty).height(8).span(12)
        .with_target(query.format(PromQueryFormat.HEATMAP).legend_format("{{le}}"))
    )  # fmt: skip


def rows(
    panel: int,
    title: str,
    queries: Sequence[tuple[str, prometheus.Dataquery]],
    *,
    empty: str,
    labels: Sequence[str],
    units: dict[str, str],
    links: dict[str, Sequence[dashboards.DashboardLink]] | None = None,
    hidden: Sequence[str] = (),
    span: int = 24,
    height: int = 8,
) -> table.Panel:
    """A row a series: its labels, then the value of each query under the query's name, if it has one.

    Queries are joined by the labels they have in common. What is `hidden` is there for links.
    """
    made = (
        table.Panel()
        .id(panel).title(title).datasource(SOURCE).no_value(empty).height(height).span(span)
        .cell_height(common.TableCellHeight.SM)
    )  # fmt: skip
    names = {}
    for ref, (name, query) in zip(_REFS, queries, strict=False):
        made.with_target(query.ref_id(ref))
        names["Value" if len(queries) == 1 else f"Value #{ref}"] = name
    left_out = {column: True for column, name in names.items() if not name} | {"Time": True}
    order = [*labels, *names]
    if len(queries) > 1:
        made.with_transformation(models.DataTransformerConfig("merge", options={}))
    made.with_transformation(
        models.DataTransformerConfig(
            "organize",
            options={
                "excludeByName": left_out,
                "indexByName": {column: place for place, column in enumerate(order)},
                "renameByName": {column: name for column, name in names.items() if name},
            },
        )
    )
    for column, unit in units.items():
        made.override_by_name(column, [models.DynamicConfigValue("unit", unit)])
    for column, those in (links or {}).items():
        shown: list[Any] = [one.build().to_json() for one in those]
        plain = [{key: one[key] for key in ("title", "url", "targetBlank")} for one in shown]
        made.override_by_name(column, [models.DynamicConfigValue("links", plain)])
    for column in hidden:
        # The first is how it was said before Grafana 12.
        made.override_by_name(column, [
            models.DynamicConfigValue("custom.hidden", value=True),
            models.DynamicConfigValue("custom.hideFrom", {"viz": True}),
        ])  # fmt: skip
    return made


def marks(name: str, expression: str, text: str) -> dashboards.AnnotationQuery:
    """Marks in every chart for as long as the query has a value."""
    return (
        dashboards.AnnotationQuery()
        .name(name).datasource(SOURCE).enable(True).icon_color(_BAD)
        .expr(expression).title_format(text)
    )  # fmt: skip


def link(title: str, url: str, *, new_tab: bool = False) -> dashboards.DashboardLink:
    """A link of a dashboard or of a cell."""
    return (
        dashboards.DashboardLink(title)
        .type(models.DashboardLinkType.LINK).url(url).target_blank(new_tab)
    )  # fmt: skip


def _thresholds(*steps: tuple[float | None, str]) -> dashboards.ThresholdsConfig:
    return (
        dashboards.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value, colour) for value, colour in steps])
    )
