"""`gradwatch report`: one page with all there is to know of a run, which needs nothing else.

Charts are drawn here, as SVG; the page holds no script, and its own policy forbids every request.
"""

from __future__ import annotations

import datetime as dt
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import jinja2
from markupsafe import Markup

from gradwatch import __version__
from gradwatch.cells import UNKNOWN
from gradwatch.config import redact
from gradwatch.errors import ConfigurationError
from gradwatch_dashboards.terminal import number
from gradwatch_dashboards.web import charts
from gradwatch_dashboards.words import BAND, BANDS, VERDICTS, WINDOW, left_out, without_gradient
from gradwatch_monitor import diagnose, recommend, views
from gradwatch_monitor.applying import applied, in_force, wanted
from gradwatch_monitor.diagnose import ended
from gradwatch_monitor.stalls import status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd

    from gradwatch_monitor.recommend import Recommendation
    from gradwatch_monitor.store import Run, Store, Summary
    from gradwatch_monitor.views import Timeline

__all__ = ["page", "write"]

EVENTS = 100  # rows of the table at most
_WIDE, _NARROW = 960, 430  # pixels
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_SECRET = re.compile(
    r"(?i)(pass(word|wd|phrase)?|secret|token|credentials?|(api|access|private)[_.-]?key)$"
)
_MAY_HOLD_ONE = re.compile(r"://|(?i:\bpass\w*\s*=)")  # a URL, or what a driver takes for one
_OPTION = re.compile(r"(?i)(--?[\w-]*(?:pass\w*|secret|token|key)[ =])\S+")  # of a command line
# What the page's own colours are to decide is drawn in the colour of its text.
_CONFIG: dict[str, Any] = {
    "aria": False,
    "background": "transparent",
    "font": "Arial, Liberation Sans, Helvetica, sans-serif",  # as wide here as there
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "titleFontWeight": "normal",
        "titlePadding": 14,
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.12,
    },
    "legend": {"labelColor": "currentColor", "columnPadding": 30},
}


def write(
    store: Store, run: Run, path: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> int:
    """Write the report of a run to a file, all of it or nothing; its size in bytes.

    Raises `ConfigurationError` where that file cannot be written.
    """
    data = page(store, run, progress).encode("utf-8", "replace")
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}; name another file with -o"
        raise ConfigurationError(msg) from None
    return len(data)


def page(store: Store, run: Run, progress: Callable[[int, int], None] = lambda *_: None) -> str:
    """The report of a run as HTML."""
    timeline = views.Timeline(run.id, run.uid)
    timeline.refresh(store)
    changes = applied(store, run.id)
    recommendation, now = recommend(store, run.id), diagnose(store, run.id)
    summary = store.summary(run.id)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "when": _when}
    drawn = {}
    every = list(_charts(store, run, timeline, recommendation))
    for done, (name, width, chart) in enumerate(every, start=1):
        drawn[name] = _svg(chart.properties(width=width))
        progress(done, len(every))
    outcomes = {one.applied.change: one for one in timeline.outcomes(store, changes)}
    events = store.events(run.id, limit=EVENTS + 1)
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        run=run,
        status=status(store, run),
        identity=_identity(store, run, summary),
        summary=summary,
        without_gradient=without_gradient,
        thinned=store.left_out(run.id),
        left_out=left_out,
        charts=drawn,
        window=WINDOW,
        timeline=timeline,
        bands=_bands(timeline),
        band="–".join(f"{100 * bound:.0f}" for bound in BAND),
        findings=[*now, *ended(store, run.id, now)],
        events=events[:EVENTS],
        more_events=len(events) > EVENTS,
        recommendation=recommendation,
        verdict="it is in force" if in_force(recommendation) else VERDICTS[recommendation.verdict],
        requests=[
            (request, wanted(request), outcomes.get(request.id))
            for request in reversed(store.changes(run.id))
        ],
        outcomes=list(outcomes.values()),
        version=__version__,
        made=dt.datetime.now(dt.UTC).timestamp(),
    )


def _bands(timeline: Timeline) -> str | None:
    """How a long run is drawn; None where every step is."""
    bands = timeline.bands()
    return None if bands is None else BANDS.format(width=bands.width)


def _charts(
    store: Store, run: Run, timeline: Timeline, recommendation: Recommendation
) -> Iterator[tuple[str, int, alt.LayerChart]]:
    """Name, width and chart of all that have something to show."""
    if not len(timeline):
        return
    events = views.event_marks(store, run.id, charts.MARKED)
    marks = views.changes_table(applied(store, run.id))
    norms, broken = views.norms_chart(timeline), views.nonfinite_stretches(timeline)
    if norms.filter(regex="^pre_norm").notna().any(axis=None):
        yield "norms", _WIDE, charts.norms(norms, events, marks, broken)
    window = views.window_of(timeline, WINDOW)
    ratios = views.clip_ratio(timeline, window)
    if len(ratios):
        chart = charts.clip_ratio(ratios, window, BAND, timeline.last_step, marks)
        yield "clip_ratio", _NARROW, chart
    curve = _curve(timeline, recommendation)
    if curve is not None:
        yield "what_if", _NARROW, curve
    losses = views.loss_chart(timeline)
    if len(losses):
        yield "loss", _NARROW, charts.loss(losses, events, marks, broken)
    rates = views.lr_chart(timeline)
    if len(rates):
        yield "lr", _NARROW, charts.lr(rates, marks)


def _curve(timeline: Timeline, recommendation: Recommendation) -> alt.LayerChart | None:
    threshold = recommendation.threshold or recommendation.current_threshold
    if threshold is None:
        return None
    curve: pd.DataFrame = views.what_if_curve(timeline, include=(threshold,))
    if len(curve) < 2:
        return None
    return charts.what_if(curve, threshold, views.what_if(timeline, threshold)[0], BAND)


def _svg(chart: alt.LayerChart) -> Markup:
    """The chart as SVG; vega counts its ids on from chart to chart."""
    text = io.StringIO()
    with alt.data_transformers.enable("default", max_rows=None):
        chart.configure(**_CONFIG).save(text, format="svg")
    return Markup(text.getvalue())  # noqa: S704 - drawn by vega


def _identity(store: Store, run: Run, summary: Summary) -> dict[str, str]:
    """Who the run is and how it was set up, without secrets."""
    settings = run.settings
    ended = run.ended_at or summary.last_time
    shown: dict[str, Any] = {
        "run": f"{run.id} ({run.uid})",
        "job": run.job,
        "store": store.name,
        "host": f"{run.host}, process {UNKNOWN if run.pid is None else run.pid}",
        "processes": run.world_size,
        "started": _when(run.started_at),
        "ended": _when(run.ended_at) if run.ended_at else None,
        "lasted": _lasted(run.started_at, ended) if ended else None,
        "last step": _when(summary.last_time) if summary.last_time is not None else None,
        "optimizer": settings.get("optimizer"),
        "clip": settings.get("clip"),
        "on NaN or inf": settings.get("on_nonfinite"),
        "parameters": f"{settings['parameters']:,}" if "parameters" in settings else None,
        "device": settings.get("device"),
        "remote control": "allowed" if settings.get("remote_control") else "not allowed",
        "versions": ", ".join(f"{k} {v}" for k, v in settings.get("versions", {}).items()),
        **{f"tag {name}": _told(name, value) for name, value in run.tags.items()},
    }
    return {name: str(value) for name, value in shown.items() if value is not None and value != ""}


def _told(name: str, value: object) -> object:
    """A tag's value; not where its name says that it is a secret, or an address holds one."""
    if _SECRET.search(name):
        return "***"
    if isinstance(value, dict):
        return {inner: _told(str(inner), its) for inner, its in value.items()}
    if isinstance(value, list):
        return [_told("", its) for its in value]
    if isinstance(value, str) and _MAY_HOLD_ONE.search(value):
        return redact(value)
    return _OPTION.sub(r"\1***", value) if isinstance(value, str) else value


def _lasted(start: float, end: float) -> str:
    try:
        return str(dt.timedelta(seconds=round(max(0.0, end - start))))
    except (ValueError, OverflowError):
        return UNKNOWN


def _when(seconds: float) -> str:
    try:
        moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    except (ValueError, OverflowError, OSError):
        return UNKNOWN
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
