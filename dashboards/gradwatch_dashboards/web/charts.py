"""The charts of the run page and the report: frames in, charts out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from gradwatch_dashboards.web import bands
from gradwatch_monitor.views import MARKS_AT_MOST

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MARKED", "clip_ratio", "loss", "lr", "norms", "what_if"]

BEFORE, AFTER = "before clipping", "after clipping"
THRESHOLD, CLIPPED = "threshold", "clipped step"
_NORM_COLOURS = {
    BEFORE: "#8da0b8",
    AFTER: "#1f6fb4",
    THRESHOLD: "#808792",  # to be seen on white and on black
    CLIPPED: "#e8833a",
}
_NORMS = {"pre_norm": BEFORE, "post_norm": AFTER, "threshold": THRESHOLD}
_EVENT_COLOURS = {
    "NaN or inf": "#d62728",
    "norm spike": "#9467bd",
    "loss spike": "#9467bd",
    "spike skipped": "#8c564b",
    "AMP overflow": "#8c8c8c",
    "records lost": "#bcbd22",
}
_EVENT_NAMES = {
    "nonfinite_gradient": "NaN or inf",
    "nonfinite_loss": "NaN or inf",
    "nonfinite_weights": "NaN or inf",
    "grad_norm_spike": "norm spike",
    "loss_spike": "loss spike",
    "spike_skipped": "spike skipped",
    "amp_overflow": "AMP overflow",
    "records_dropped": "records lost",
}
# What is drawn as an area: all steps, or of a band some.
_NAN_AREAS = {"stretch of NaN": "#d62728", "NaN in some steps": "#e07b7b"}
MARKED = tuple(_EVENT_NAMES)  # kinds of events
_APPLIED, _APPLIED_COLOUR = "threshold applied", "#12806a"
_WIDE = 20.0  # times the least loss, from which on a loss is drawn on a log scale
_CROWD = 40  # marks, above which they are drawn fainter: the lines are what matters


def _legend(narrow: int = 2) -> alt.Legend:
    """A line of entries; where the chart is narrow, columns of them."""
    return alt.Legend(
        title=None, orient="top", direction="horizontal", symbolStrokeWidth=2, symbolOpacity=1,
        labelLimit=400, columns=alt.ExprRef(f"width < 340 ? {narrow} : 0"),
    )  # fmt: skip


_LEGEND = _legend()


def norms(
    frame: pd.DataFrame,
    events: pd.DataFrame,
    changes: pd.DataFrame | None = None,
    stretches: pd.DataFrame | None = None,
) -> alt.LayerChart:
    """Pre- and post-clip norm, the threshold, clipped steps, events and changes over the steps.

    `stretches` are those of NaN, drawn as areas.
    """
    x = _step_axis(frame)
    kinds_marked = (
        "nonfinite_gradient", "nonfinite_weights", "grad_norm_spike", "spike_skipped", "amp_overflow",
        "records_dropped",
    )  # fmt: skip
    area, rules = _areas(stretches, x), _rules(events, stretches, kinds_marked, x)
    lines = _norm_bands(frame, x) if bands.is_banded(frame) else _norm_lines(frame, x)
    return _layered(area, rules, *lines, *_applied(changes, x), height=340)


def _norm_bands(frame: pd.DataFrame, x: alt.X) -> list[alt.Chart]:
    """The norms of a long run. Which of its steps were clipped is in the clip ratio's chart."""
    kinds = {name: kind for name, kind in _NORMS.items() if frame[f"{name}_min"].notna().any()}
    every = bands.tidy(frame, kinds or _NORMS, mean="geomean")
    y = _norm_axis(pd.concat([every["least"], every["greatest"]]))
    return bands.layers(every, x, y, _norm_colour([*kinds.values()]), dashed=THRESHOLD)


def _norm_lines(frame: pd.DataFrame, x: alt.X) -> list[alt.Chart]:
    """The norms step by step, and which of the steps were clipped."""
    drawn = frame.rename(columns=_NORMS)
    kinds = [name for name in _NORMS.values() if drawn[name].notna().any()]
    lines = drawn.melt("step", kinds, var_name="kind", value_name="norm")
    lines.loc[~(lines["norm"] > 0), "norm"] = np.nan
    marks = frame.loc[frame["clipped"], ["step", "pre_norm"]].rename(columns={"pre_norm": "norm"})
    marks["kind"] = CLIPPED
    colour = _norm_colour([*kinds, *([CLIPPED] if len(marks) else [])])
    y = _norm_axis(lines["norm"])
    y.shorthand = "norm:Q"
    tips = [
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("kind:N"),
        alt.Tooltip("norm:Q", format=".4g"),
    ]
    plotted = lines[lines["kind"] != THRESHOLD]
    line = (
        alt.Chart(plotted)
        .mark_line(strokeWidth=1.2, clip=True)
        .encode(x=x, y=y, color=colour, detail=alt.Detail("kind:N"), tooltip=tips)
    )
    dots = _dots(lines, "norm").encode(x=x, y=y, color=colour, tooltip=tips)
    points = (
        alt.Chart(marks)
        .mark_point(size=14, filled=True, opacity=0.55, clip=True)
        .encode(x=x, y=y, color=colour, tooltip=tips)
    )
    threshold = (
        alt.Chart(lines[lines["kind"] == THRESHOLD])
        .mark_line(strokeDash=[6, 4], strokeWidth=1.6, interpolate="step-after", clip=True)
        .encode(x=x, y=y, color=colour, tooltip=tips)
    )
    return [line, dots, points, threshold]


def _norm_axis(values: pd.Series[Any]) -> alt.Y:
    return alt.Y(
        title="gradient norm (log scale)",
        scale=_log_scale(values),
        axis=alt.Axis(format="~g", values=_log_ticks(values)),
    )


def _norm_colour(shown: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=shown, range=[_NORM_COLOURS[kind] for kind in shown])
    return alt.Color("kind:N", legend=_LEGEND, scale=scale)


def clip_ratio(
    frame: pd.DataFrame,
    window: int,
    band: tuple[float, float],
    last_step: int,
    changes: pd.DataFrame | None = None,
) -> alt.LayerChart:
    """The share of clipped steps over a rolling window, against the band, and changes.

    Of a long run, the share in each `window` steps.
    """
    banded = bands.is_banded(frame)
    over = f"of each {window:,} steps" if banded else f"of the last {window:,} steps"
    ratio, inside = f"clipped {over}", f"band {_percent(band)}"
    x = _step_axis(pd.DataFrame({"step": [0, last_step]}))
    scale = alt.Scale(domain=[ratio, inside], range=[_NORM_COLOURS[CLIPPED], "#bfe3c6"])
    colour = alt.Color("kind:N", legend=_legend(narrow=1), scale=scale)
    y_axis = alt.Axis(format=".0%", tickCount=5)
    area = pd.DataFrame(
        {"step": [0], "to": [last_step], "low": [band[0]], "high": [band[1]], "kind": [inside]}
    )
    back = (
        alt.Chart(area)
        .mark_rect(opacity=0.6)
        .encode(
            x=x,
            x2=alt.X2("to:Q"),
            y=alt.Y("low:Q", title="clip ratio"),
            y2=alt.Y2("high:Q"),
            color=colour,
        )
    )
    drawn = frame.assign(kind=ratio)
    if banded:
        drawn = bands.stepped(drawn, "clip_ratio")
    line = alt.Chart(drawn).mark_line(
        strokeWidth=1.6, interpolate="step-after" if banded else "linear", clip=True
    )
    y = alt.Y("clip_ratio:Q", title="clip ratio", axis=y_axis, scale=alt.Scale(domain=[0, 1]))
    tips = [alt.Tooltip("step:Q", format=","), alt.Tooltip("clip_ratio:Q", format=".1%")]
    shown = [
        layer.encode(x=x, y=y, color=colour, tooltip=tips)
        for layer in (line, _dots(drawn, "clip_ratio"))
    ]
    return _layered(back, *shown, *_applied(changes, x), height=250)


def loss(
    frame: pd.DataFrame,
    events: pd.DataFrame,
    changes: pd.DataFrame | None = None,
    stretches: pd.DataFrame | None = None,
) -> alt.LayerChart:
    """The loss over the steps, with its own events, stretches of NaN, changes of the threshold.

    One that spans a factor of twenty, as a diverged run's does, is drawn on a log scale.
    """
    x = _step_axis(frame)
    banded = bands.is_banded(frame)
    known = pd.concat([frame["loss_min"], frame["loss_max"]]) if banded else frame["loss"]
    known = known[np.isfinite(known)]
    wide = known.min() > 0 and known.max() > _WIDE * known.min()
    y = alt.Y(title="loss", axis=alt.Axis(format="~r"), scale=alt.Scale(zero=False, nice=True))
    if wide:
        y = alt.Y(
            title="loss (log scale)", scale=_log_scale(known),
            axis=alt.Axis(format="~g", values=_log_ticks(known)),
        )  # fmt: skip
    area = _areas(stretches, x)
    rules = _rules(events, stretches, ("nonfinite_loss", "loss_spike"), x)
    lines = _one(frame, "loss", x, y, mean="geomean" if wide else "mean")
    return _layered(area, rules, *lines, *_applied(changes, x), height=250)


def lr(frame: pd.DataFrame, changes: pd.DataFrame | None = None) -> alt.LayerChart:
    """The learning rate over the steps, and changes of the threshold."""
    x = _step_axis(frame)
    greatest = float(frame["lr_max" if bands.is_banded(frame) else "lr"].max())
    # A rate that never changes would lie on the frame, and not be seen.
    scale = alt.Scale(domain=[0, 1.1 * greatest or 1])
    y = alt.Y(title="learning rate", axis=alt.Axis(format="~g"), scale=scale)
    lines = _one(frame, "lr", x, y, interpolate="step-after")
    return _layered(*lines, *_applied(changes, x), height=250)


def _one(
    frame: pd.DataFrame, name: str, x: alt.X, y: alt.Y, mean: str = "mean", **look: Any
) -> list[alt.Chart]:
    """The layers of a chart of one value: its bands, or a line with its dots."""
    colour = _NORM_COLOURS[AFTER]
    if bands.is_banded(frame):
        return bands.layers(bands.tidy(frame, {name: name}, mean), x, y, alt.ColorValue(colour))
    y = y.copy()
    y.shorthand = f"{name}:Q"
    tips = [alt.Tooltip("step:Q", format=","), alt.Tooltip(f"{name}:Q", format=".4g")]
    line = alt.Chart(frame).mark_line(strokeWidth=1.2, color=colour, clip=True, **look)
    dots = _dots(frame, name, color=colour)
    return [layer.encode(x=x, y=y, tooltip=tips) for layer in (line, dots)]


def what_if(
    curve: pd.DataFrame, threshold: float, ratio: float, band: tuple[float, float]
) -> alt.LayerChart:
    """Clip ratio against threshold over the run's own norms, with the chosen one marked."""
    x = alt.X(
        "threshold:Q",
        title="threshold (log scale)",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~g", values=_log_ticks(curve["threshold"])),
    )
    y = alt.Y(
        "clip_ratio:Q", title="would have been clipped", axis=alt.Axis(format=".0%"),
        scale=alt.Scale(domain=[0, 1]),
    )  # fmt: skip
    area = pd.DataFrame(
        {
            "threshold": [curve["threshold"].min()],
            "to": [curve["threshold"].max()],
            "low": [band[0]],
            "clip_ratio": [band[1]],
        }
    )
    back = (
        alt.Chart(area)
        .mark_rect(opacity=0.6, color="#bfe3c6")
        .encode(x=x, x2=alt.X2("to:Q"), y=y, y2=alt.Y2("low:Q"))
    )
    line = (
        alt.Chart(curve)
        .mark_line(strokeWidth=1.6, color=_NORM_COLOURS[AFTER])
        .encode(
            x=x,
            y=y,
            tooltip=[
                alt.Tooltip("threshold:Q", format=".3g"),
                alt.Tooltip("clip_ratio:Q", format=".1%"),
            ],
        )
    )
    chosen = pd.DataFrame({"threshold": [threshold], "clip_ratio": [ratio]})
    point = alt.Chart(chosen).mark_point(size=90, filled=True, color="#e8833a").encode(x=x, y=y)
    rule = alt.Chart(chosen).mark_rule(strokeDash=[4, 3], color="#e8833a").encode(x=x)
    return _layered(back, line, rule, point, height=250)


def _dots(frame: pd.DataFrame, name: str, **look: Any) -> alt.Chart:
    """A dot where a line has none: at values with nothing before and nothing after."""
    known = pd.Series(np.isfinite(frame[name].to_numpy(dtype=float)), frame.index)
    lines = known.groupby(frame["kind"] if "kind" in frame else np.zeros(len(frame)))
    near = lines.shift(1, fill_value=False) | lines.shift(-1, fill_value=False)
    alone = frame[known & ~near]
    chart: alt.Chart = alt.Chart(alone).mark_point(
        size=10, filled=True, opacity=1, clip=True, **look
    )
    return chart


def _areas(stretches: pd.DataFrame | None, x: alt.X) -> alt.Chart | None:
    """Where step after step had NaN or inf; of a long run, bands in which many had, the paler the fewer."""
    if stretches is None or stretches.empty:
        return None
    areas = stretches.assign(share=stretches.get("share", 1.0)).tail(MARKS_AT_MOST)
    whole, part = _NAN_AREAS
    areas["event"] = np.where(areas["share"] == 1, whole, part)
    areas["opacity"] = 0.06 + 0.12 * areas["share"]
    shown = [name for name in _NAN_AREAS if name in set(areas["event"])]
    scale = alt.Scale(domain=shown, range=[_NAN_AREAS[name] for name in shown])
    chart: alt.Chart = (
        alt.Chart(areas)
        .mark_rect(clip=True)
        .encode(
            x=x,
            x2=alt.X2("to:Q"),
            opacity=alt.Opacity("opacity:Q", scale=None, legend=None),
            fill=alt.Fill("event:N", legend=_LEGEND, scale=scale),
            tooltip=[
                alt.Tooltip("event:N"),
                alt.Tooltip("step:Q", title="from", format=","),
                alt.Tooltip("to:Q", format=","),
                alt.Tooltip("share:Q", title="of the steps", format=".1%"),
            ],
        )
    )
    return chart


def _outside(events: pd.DataFrame, stretches: pd.DataFrame | None) -> pd.DataFrame:
    """The events that no stretch of NaN says already."""
    if stretches is None or stretches.empty:
        return events
    step = events["step"].to_numpy()[:, None]
    first, last = stretches["step"].to_numpy(), stretches["to"].to_numpy()
    within = np.asarray(((step >= first) & (step <= last)).any(axis=1))
    said = within & events["kind"].str.startswith("nonfinite").to_numpy(dtype=bool)
    return events[np.logical_not(said)]


def _rules(
    events: pd.DataFrame, stretches: pd.DataFrame | None, kinds: Sequence[str], x: alt.X
) -> alt.Chart | None:
    """A vertical line at each of the latest events of these kinds."""
    marked = events[events["kind"].isin(kinds)]
    counts = marked["kind"].value_counts()
    # Where there are more, who looks is not to think that they begin here.
    cut = {_EVENT_NAMES[kind] for kind in counts[counts >= MARKS_AT_MOST].index}
    marked = _outside(marked, stretches)
    if marked.empty:
        return None
    names = marked["kind"].map(_EVENT_NAMES)
    told = {name: f"{name} (the latest)" if name in cut else name for name in _EVENT_COLOURS}
    shown = [name for name in _EVENT_COLOURS if name in set(names)]
    marked = marked.assign(event=names.map(told))
    scale = alt.Scale(
        domain=[told[name] for name in shown], range=[_EVENT_COLOURS[name] for name in shown]
    )
    chart: alt.Chart = (
        alt.Chart(marked[["step", "event", "message"]])
        .mark_rule(strokeWidth=1.4, opacity=0.7 if len(marked) <= _CROWD else 0.25)
        .encode(
            x=x,
            stroke=alt.Stroke("event:N", legend=_LEGEND, scale=scale),
            tooltip=[
                alt.Tooltip("step:Q", format=","),
                alt.Tooltip("event:N"),
                alt.Tooltip("message:N"),
            ],
        )
    )
    return chart


def _applied(changes: pd.DataFrame | None, x: alt.X) -> list[alt.Chart]:
    """A line with a head at each of the latest changes of the threshold: who, when, from, to."""
    if changes is None or changes.empty:
        return []
    marked = changes.tail(MARKS_AT_MOST).assign(mark=_APPLIED)
    for name in ("from", "to"):
        marked[name] = [f"{v:.4g}" if v == v and v is not None else "–" for v in marked[name]]  # noqa: PLR0124
    # Vega would show it in the reader's own zone.
    marked["when"] = marked.pop("time").dt.strftime("%Y-%m-%d %H:%M:%S")
    base = alt.Chart(marked).encode(
        x=x,
        tooltip=[
            alt.Tooltip("mark:N", title="mark"),
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip("from:N"),
            alt.Tooltip("to:N"),
            alt.Tooltip("clip:N"),
            alt.Tooltip("by:N", title="who"),
            alt.Tooltip("when:N", title="when (UTC)"),
            alt.Tooltip("reason:N"),
        ],
    )
    scale = alt.Scale(domain=[_APPLIED], range=[_APPLIED_COLOUR])
    rule = base.mark_rule(strokeWidth=1.6, color=_APPLIED_COLOUR)
    head = base.mark_point(shape="triangle-down", size=110, filled=True, opacity=1).encode(
        y=alt.YValue(0),  # type: ignore[no-untyped-call]
        fill=alt.Fill("mark:N", legend=_LEGEND, scale=scale),
    )
    return [rule, head]


def _log_ticks(values: pd.Series[Any]) -> list[float]:
    """1, 2 and 5 times the powers of ten within the values; only the powers where that is many."""
    positive = values[values > 0]
    if positive.empty:
        return []
    decades = range(
        int(np.floor(np.log10(positive.min()))), int(np.ceil(np.log10(positive.max()))) + 1
    )
    steps = (1, 2, 5) if len(decades) <= 5 else (1,)
    return [float(f"{step}e{decade}") for decade in decades for step in steps]


def _log_scale(values: pd.Series[Any]) -> alt.Scale:
    """A log axis for these values; a single one stands in its middle."""
    positive = values[values > 0]
    if len(positive) and positive.min() == positive.max():
        middle = float(positive.min())
        return alt.Scale(type="log", nice=False, domain=[middle / 2, 2 * middle])
    return alt.Scale(type="log", nice=False, padding=8)


def _step_axis(frame: pd.DataFrame) -> alt.X:
    steps = frame["step"]
    low, high = (int(steps.min()), int(steps.max())) if len(steps) else (0, 1)
    if bands.is_banded(frame) and len(steps):
        high = int(frame["to"].max()) - 1
    return alt.X(
        "step:Q",
        title="optimizer step",
        scale=alt.Scale(domain=[low, max(high, low + 1)], nice=False),
        axis=alt.Axis(format=",d", tickMinStep=1),
    )


def _layered(*layers: alt.Chart | None, height: int) -> alt.LayerChart:
    return alt.LayerChart(layer=[layer for layer in layers if layer is not None], height=height)


def _percent(band: tuple[float, float]) -> str:
    return f"{100 * band[0]:.0f}–{100 * band[1]:.0f} %"
