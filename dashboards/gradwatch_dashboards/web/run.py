"""The run page: norms, clip ratio, loss, learning rate, events, the recommendation, a what-if."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st
from altair.utils import schemapi

from gradwatch.errors import RunNotFoundError
from gradwatch_dashboards.terminal import number
from gradwatch_dashboards.web import charts, control
from gradwatch_dashboards.web.source import badge, open_store, plain, tell_malformed, telling
from gradwatch_dashboards.words import (
    BAND,
    BANDS,
    VERDICTS,
    WINDOW,
    last_step,
    left_out,
    without_gradient,
)
from gradwatch_monitor import Run, diagnose, views
from gradwatch_monitor.applying import applied, in_force
from gradwatch_monitor.diagnose import ended
from gradwatch_monitor.recommend import Recommendation, recommend_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from gradwatch_monitor.applying import Outcome
    from gradwatch_monitor.store import Summary

REFRESH_SECONDS = 2.0

store = open_store()


def chosen() -> Run:
    """The run that the address or the picker names; the latest where neither does."""
    runs = store.runs(limit=200)
    wanted = st.query_params.get("run")
    current = runs[0]
    if wanted is not None:
        try:
            current = store.run(wanted)
        except RunNotFoundError as error:
            st.warning(plain(str(error)))
    labels = {run.uid: f"{run.name} (run {run.id})" for run in (*runs, current)}
    picked = st.selectbox(
        "Run",
        list(labels),
        index=list(labels).index(current.uid),
        format_func=labels.__getitem__,
        label_visibility="collapsed",
        key=f"picker of {current.uid}",
    )
    if picked != current.uid:
        st.query_params["run"] = f"uid:{picked}"
        st.rerun()
    return current


@telling()
def heading(run: Run, summary: Summary) -> None:
    """Who the run is, and its numbers."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header(plain(run.name), anchor=False, width="content")
        badge(store, run)
    facts = [run.settings.get("optimizer"), run.settings.get("clip"), f"on {run.host}"]
    if summary.last_time is not None:
        taken = last_step(summary.last_time, going_on=run.ended_at is None)
        facts.append(f"last step {taken}")
    facts += [f"{key}={value}" for key, value in run.tags.items()]
    st.caption(plain(" · ".join(str(fact) for fact in facts if fact)))
    ratio = summary.clip_ratio
    values = {
        "Steps": f"{summary.taken:,}",
        "Clipped": "–" if ratio is None else f"{100 * ratio:.1f} %",
        "NaN or inf": f"{summary.nonfinite:,}",
        "Skipped": f"{summary.skipped:,}",
        "AMP overflows": f"{summary.amp_overflows:,}",
        "Last norm": number(summary.last_pre_norm),
        "Last loss": number(summary.last_loss),
        "Threshold": number(summary.last_threshold),
    }
    with st.container(horizontal=True, gap="medium"):  # its tiles go on below where it is narrow
        for label, value in values.items():
            told = "The last finite one." if label.startswith("Last") else None
            st.metric(label, value, help=told, width="content")
    if summary.no_gradient:
        st.caption(plain(f"{without_gradient(summary.no_gradient)}."))


@telling()
def advice(run: Run, recommendation: Recommendation, outcomes: Sequence[Outcome]) -> None:
    """The recommendation, its numbers and its reasons; and what can be done about it."""
    with st.container(border=True):
        held = in_force(recommendation)
        verdict = "it is in force" if held else VERDICTS[recommendation.verdict]
        st.markdown(f"#### Recommendation: {verdict}")
        st.markdown(f"**{plain(recommendation.sentence)}**")
        st.markdown("\n".join(f"- {plain(reason)}" for reason in recommendation.other_reasons))
        if recommendation.policy is not None:
            st.code(f"clip=gradwatch.{recommendation.policy}", language="python")
        control.panel(store, run, recommendation, outcomes)


@telling()
def slider(timeline: views.Timeline, recommended: float | None, current: float | None) -> None:
    """What another threshold would have clipped of this run's own steps."""
    st.subheader("What if", anchor=False)
    curve = views.what_if_curve(timeline, include=(recommended, current))
    if len(curve) < 2:
        st.caption("There are no finite norms after the first fifth.")
        return
    options = curve["threshold"].tolist()
    held, offered = st.session_state.get("threshold"), st.session_state.get("offered")
    follows = held is None or held == offered  # nobody has moved it: it stays at the recommended
    wanted = held if held and not follows else recommended or options[len(options) // 2]
    nearest = min(options, key=lambda option: abs(math.log(option / wanted)))
    if follows:
        st.session_state["offered"] = offered = nearest
    threshold = st.select_slider(
        "Threshold",
        options,
        value=nearest,
        format_func=lambda option: f"{option:g}",
        # New norms move the ends of the range: that is another slider, at the same place.
        key=f"what if {options[0]} {options[-1]} {len(options)} {offered}",
    )
    st.session_state["threshold"] = threshold
    ratio, steps = views.what_if(timeline, threshold)
    st.markdown(
        f"At **{threshold:g}**, **{100 * ratio:.1f} %** of the {steps:,} steps after the run's first "
        "fifth would have been clipped."
    )
    st.altair_chart(charts.what_if(curve, threshold, ratio, BAND))
    st.caption("Over this run's own norms. Clipping changes a run: check it again on the next one.")


@telling()
def findings(run_id: int) -> None:
    """What is wrong now, the gravest first; folded away, what was and has ended."""
    now = diagnose(store, run_id)
    for finding in now:
        show = {"critical": st.error, "warning": st.warning}.get(finding.severity, st.info)
        show(plain(f"{finding.message} {finding.advice}"))
    if past := ended(store, run_id, now):
        with st.expander(f"{len(past)} finding{'s' if len(past) > 1 else ''} that ended"):
            for finding in past:
                span = f"steps {finding.first_step:,}–{finding.last_step:,}"
                st.markdown(plain(f"{span}: {finding.message}"))


@telling()
def norms(
    timeline: views.Timeline, events: pd.DataFrame, marks: pd.DataFrame, broken: pd.DataFrame
) -> None:
    """The gradient norms, and of a long run what a band of steps is drawn by."""
    st.subheader("Gradient norm", anchor=False)
    st.altair_chart(charts.norms(views.norms_chart(timeline), events, marks, broken))
    if (bands := timeline.bands()) is not None:
        st.caption(BANDS.format(width=bands.width))


@telling()
def loss(
    timeline: views.Timeline, events: pd.DataFrame, marks: pd.DataFrame, broken: pd.DataFrame
) -> None:
    """The loss, or why there is none to draw."""
    st.subheader("Loss", anchor=False)
    losses = views.loss_chart(timeline)
    if len(losses):
        st.altair_chart(charts.loss(losses, events, marks, broken))
    elif timeline.has_nonfinite_loss:
        st.caption("No loss was finite.")
    else:
        st.caption("No loss was logged: gradwatch.Agent.of(optimizer).log(loss=loss)")


@telling()
def learning_rate(timeline: views.Timeline, marks: pd.DataFrame) -> None:
    """The learning rate of the first parameter group."""
    st.subheader("Learning rate", anchor=False)
    rates = views.lr_chart(timeline)
    if len(rates):
        st.altair_chart(charts.lr(rates, marks))
        if "lr_min" in rates and not np.isfinite(rates["lr_min"].iloc[0]):
            st.caption(
                "It is not known of the earlier steps, which an older version has summed up. Where their "
                "records are left, `gradwatch store migrate` adds it."
            )
    else:
        st.caption("The optimizer has none.")


def page(run_id: int) -> None:
    """Everything that moves while the run goes on."""
    run = store.run(run_id)
    if st.session_state.get("live") and not run.is_live():
        st.session_state["live"] = False
        st.rerun()
    timeline = st.session_state.get("timeline")
    if timeline is None or timeline.uid != run.uid:
        timeline = st.session_state["timeline"] = views.Timeline(run_id, run.uid)
        for name in ("threshold", "offered"):
            st.session_state.pop(name, None)
    timeline.refresh(store)
    summary = store.summary(run_id)
    heading(run, summary)
    if thinned := store.left_out(run_id):
        st.caption(plain(f"{left_out(thinned)}."))
    findings(run_id)
    if not len(timeline):
        st.info("This run has not stored a step yet.")
        return
    events, noted = (
        views.event_marks(store, run_id, charts.MARKED),
        views.events_table(store, run_id),
    )
    recommendation = recommend_from(timeline.history(run))
    changes = applied(store, run_id)
    marks = views.changes_table(changes)
    last = timeline.last_step

    broken = views.nonfinite_stretches(timeline)
    norms(timeline, events, marks, broken)
    left, right = st.columns(2)
    with left:
        st.subheader("Clip ratio", anchor=False)
        window = views.window_of(timeline, WINDOW)
        ratios = views.clip_ratio(timeline, window)
        if len(ratios):
            st.altair_chart(charts.clip_ratio(ratios, window, BAND, last, marks))
        elif summary.finite:
            st.caption(f"From {window} steps on.")
        else:
            st.caption("No step has a finite gradient norm.")
    with right:
        loss(timeline, events, marks, broken)
    left, right = st.columns(2)
    with left:
        advice(run, recommendation, timeline.outcomes(store, changes))
        learning_rate(timeline, marks)
    with right:
        slider(timeline, recommendation.threshold, recommendation.current_threshold)
    st.subheader("Events", anchor=False)
    if noted.empty:
        st.caption("None were noted.")
    else:
        st.dataframe(
            noted,
            hide_index=True,
            column_order=["step", "time", "kind", "severity", "origin", "message", "parameters"],
            column_config={
                "time": st.column_config.DatetimeColumn("time (UTC)", format="YYYY-MM-DD HH:mm:ss"),
                "message": st.column_config.TextColumn(width=640),
            },
        )


def guarded(run_id: int) -> None:
    """The page; what goes wrong is told on it, and so is what the store holds that cannot be right."""
    # Altair would check every part of each chart against its schema, which takes longer than making it.
    with telling(), schemapi.debug_mode(False):
        page(run_id)
    tell_malformed(store)


with telling():
    run = chosen()
    st.session_state["live"] = run.is_live()
    st.fragment(guarded, run_every=REFRESH_SECONDS if run.is_live() else None)(run.id)
