"""How a long run is drawn: of each band its range, its mean, and the last values as a line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["hover", "is_banded", "layers", "stepped", "tidy"]


def is_banded(frame: pd.DataFrame) -> bool:
    """Whether a row of the frame is a band of steps, not one step."""
    return "to" in frame


def tidy(frame: pd.DataFrame, names: Mapping[str, str], mean: str = "mean") -> pd.DataFrame:
    """A row a band and kind: step, to, kind, least, mean, greatest, last.

    `names` are the columns' names and the kinds that they are called; `mean` is "geomean" for the
    geometric one.
    """
    ends = {"min": "least", mean: "mean", "max": "greatest", "last": "last"}
    parts = [
        frame[["step", "to", *(f"{name}_{end}" for end in ends)]]
        .rename(columns={f"{name}_{end}": called for end, called in ends.items()})
        .assign(kind=kind)
        for name, kind in names.items()
    ]
    return pd.concat(parts, ignore_index=True)


def stepped(bands: pd.DataFrame, *values: str) -> pd.DataFrame:
    """The rows that a mark with interpolate="step-after" draws each band by, and nothing else.

    A band that no other follows at once needs a row at its end, and one without values after it.
    """
    known = bands[values[0]].notna()
    shown = bands.loc[known, ["step", "kind", *values]]
    following = bands.groupby("kind", sort=False)
    goes_on = (following["step"].shift(-1) == bands["to"]) & following[values[0]].shift(-1).notna()
    last = bands[known & ~goes_on]
    closing = last.assign(step=last["to"])[["step", "kind", *values]]
    rows = pd.concat([shown, closing, closing.assign(**dict.fromkeys(values, float("nan")))])
    return rows.sort_values(["kind", "step"], kind="stable", ignore_index=True)


def layers(
    bands: pd.DataFrame, x: alt.X, y: alt.Y, colour: Any, dashed: str | None = None
) -> list[alt.Chart]:
    """The ranges of tidy bands, over them the last values and the means.

    `y` is without a field; `colour` is an encoding or a value; the mean of the kind `dashed` is a
    dashed line. Over all of them lies what the pointer shows.
    """

    def at(field: str) -> alt.Y:
        encoded = y.copy()
        encoded.shorthand = f"{field}:Q"
        return encoded

    steps: dict[str, Any] = {"interpolate": "step-after", "clip": True}
    ranges = stepped(bands, "least", "greatest")
    means = stepped(bands, "mean")
    area = (
        alt.Chart(ranges)
        .mark_area(opacity=0.25, **steps)
        .encode(
            x=x, y=at("greatest"), y2=alt.Y2("least:Q"), color=colour, detail=alt.Detail("kind:N")
        )
    )
    # An outline: the one spike of a hundred thousand steps is a pixel wide.
    edges = [
        alt.Chart(ranges)
        .mark_line(strokeWidth=0.6, opacity=0.6, **steps)
        .encode(x=x, y=at(end), color=colour, detail=alt.Detail("kind:N"))
        for end in ("greatest", "least")
    ]
    ends = bands.assign(step=bands["to"] - 1)[["step", "kind", "last"]]
    last = (
        alt.Chart(ends)
        .mark_line(strokeWidth=0.7, opacity=0.8, clip=True)
        .encode(x=x, y=at("last"), color=colour, detail=alt.Detail("kind:N"))
    )
    drawn = []
    for dash, kept in (([1, 0], means["kind"] != dashed), ([6, 4], means["kind"] == dashed)):
        if kept.any():
            line = alt.Chart(means[kept]).mark_line(strokeWidth=1.8, strokeDash=dash, **steps)
            drawn.append(line.encode(x=x, y=at("mean"), color=colour, detail=alt.Detail("kind:N")))
    return [area, *edges, last, *drawn, hover(bands, x)]


def hover(bands: pd.DataFrame, x: alt.X) -> alt.Chart:
    """What the pointer shows over a band: its steps, and of each kind the four values."""
    wide = bands.pivot_table(index=["step", "to"], columns="kind", sort=False)
    shown = pd.DataFrame(index=wide.index)
    for kind in bands["kind"].unique():
        for value in ("least", "mean", "greatest", "last"):
            if (value, kind) in wide:
                shown[f"{kind}, {value}"] = wide[value, kind].map("{:.4g}".format)
    shown = shown.reset_index()
    shown["steps"] = [
        f"{a:,} to {b - 1:,}" for a, b in zip(shown["step"], shown["to"], strict=True)
    ]
    tips = [
        alt.Tooltip(field=name, type="nominal")
        for name in shown.columns
        if name not in {"step", "to"}
    ]
    chart: alt.Chart = (
        alt.Chart(shown)
        .mark_rect(opacity=0)
        .encode(x=x, x2=alt.X2("to:Q"), tooltip=[tips[-1], *tips[:-1]])
    )
    return chart
