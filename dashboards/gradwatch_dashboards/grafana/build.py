"""Writes the dashboards, or with --check says whether they are what this would write.

Every name comes from `gradwatch.metrics`; a query that asks for another is an error here. Needs
`grafana-foundation-sdk`, whose types are Grafana's schema: of the development environment alone.

    python -m gradwatch_dashboards.grafana.build
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    TextBoxVariable,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import VariableOption, VariableRefresh, VariableSort

from gradwatch.metrics import BY_NAME
from gradwatch_dashboards.grafana.panels import (
    SOURCE,
    curves,
    figure,
    heat,
    link,
    marks,
    now,
    over_time,
    rows,
)
from gradwatch_dashboards.grafana.push import DATA_SOURCE
from gradwatch_dashboards.words import BAND

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PANELS_OF_ALERTS", "RECORDED", "SILENT", "agent", "main", "overview", "run", "texts"]

_HERE = Path(__file__).parent / "dashboards"
RECORDED = "run:gradwatch_clip_ratio:rate5m"
# Targets that do not answer, or at whose address another process does: as the alert has it.
SILENT = (
    'up == 0 or up{process!=""} unless on (job, instance, process) '
    "label_join(group by (job, instance, answering) (gradwatch_exporter_info), "
    '"process", "", "answering")'
)

_RATE = "$__rate_interval"
_ALL = 'run=~"$run", rank=~"$rank"'
_ONE = 'run="$run", rank=~"$rank"'
_SERIES = "{{run}} (rank {{rank}})"
_NO_RUN = "no run"
_WHO = ("rank", *BY_NAME["gradwatch_run_info"].labels)
_ALERTS = f'ALERTS{{alertname=~"Gradwatch.*", alertstate="firing", {_ALL}}}'  # of one run, too
# Which panel shows what an alert is about: (dashboard, panel). The rules link there too.
PANELS_OF_ALERTS = {
    "GradwatchNonfiniteGradients": ("gradwatch-run", 13),
    "GradwatchNonfiniteLoss": ("gradwatch-run", 13),
    "GradwatchStepsNotApplied": ("gradwatch-run", 13),
    "GradwatchGradientNormSpike": ("gradwatch-run", 7),
    "GradwatchLossSpikes": ("gradwatch-run", 9),
    "GradwatchClipRatioHigh": ("gradwatch-run", 8),
    "GradwatchRunStalled": ("gradwatch-run", 12),
    "GradwatchCriticalFinding": ("gradwatch-run", 16),
    "GradwatchRecordsDropped": ("gradwatch-agent", 6),
    "GradwatchAgentGone": ("gradwatch-agent", 11),
}
_OF_THE_ROW = "var-run=${__data.fields.run}&var-rank=${__data.fields.rank}"
_TO_THE_RUN = f"/d/gradwatch-run?{_OF_THE_ROW}&${{__url_time_range}}"


def overview() -> Dashboard:
    """All runs: how they do, and which of them wants somebody to look."""
    made = _dashboard("gradwatch-overview", "gradwatch: overview", several=True)
    for panel in (
        figure(1, "Runs going on", now(f"sum(gradwatch_run_active{{{_ALL}}})"), "short", empty="0"),
        figure(2, "Steps a second", now(f"sum(rate(gradwatch_steps_total{{{_ALL}}}[{_RATE}]))"),
               "short", empty=_NO_RUN),
        figure(3, "Steps with NaN or inf", now(f"sum(gradwatch_nonfinite_steps_total{{{_ALL}}})"),
               "short", empty=_NO_RUN, bad_from=1, says="Since each run's process began."),
        figure(4, "Steps not applied", now(f"sum(gradwatch_skipped_steps_total{{{_ALL}}})"),
               "short", empty=_NO_RUN, says="NaN or inf, overflows of a loss scaler, spikes."),
        figure(5, "Records lost", now(f"sum(gradwatch_dropped_records_total{{{_ALL}}})"),
               "short", empty=_NO_RUN, bad_from=1),
        figure(6, "Alerts", now(f"count({_ALERTS})"), "short", empty="none", bad_from=1),
        figure(13, "Losses of NaN or inf",
               now(f"sum(gradwatch_nonfinite_loss_steps_total{{{_ALL}}})"), "short", empty=_NO_RUN,
               bad_from=1, says="Since each run's process began.", span=8),
        figure(14, "Spikes",
               now(f"sum(gradwatch_grad_norm_spikes_total{{{_ALL}}}) + "
                   f"sum(gradwatch_loss_spikes_total{{{_ALL}}})"), "short", empty=_NO_RUN,
               says="Of the gradient norm and of the loss.", span=8),
        figure(15, "Steps without any gradient",
               now(f"sum(gradwatch_no_gradient_steps_total{{{_ALL}}})"), "short", empty=_NO_RUN,
               says="They have no norm, and are not in the clip ratio.", span=8),
        rows(
            7, "Runs",
            [
                ("steps", now(_each(f"gradwatch_steps_total{{{_ALL}}}"))),
                ("clipped", now(_each(f"{RECORDED}{{{_ALL}}}"))),
                ("norm", now(_each(f"gradwatch_last_grad_norm_pre_clip{{{_ALL}}}"))),
                ("greatest", now(_each(f"gradwatch_max_grad_norm_pre_clip{{{_ALL}}}"))),
                ("threshold", now(_each(f"gradwatch_clip_threshold{{{_ALL}}}"))),
                ("loss", now(_each(f"gradwatch_loss{{{_ALL}}}"))),
                ("last step", now(_each(f"time() - gradwatch_last_step_timestamp_seconds{{{_ALL}}}"))),
                ("going on", now(_each(f"gradwatch_run_active{{{_ALL}}}"))),
                ("", now(f"max by (run, rank, optimizer, policy, uid) (gradwatch_run_info{{{_ALL}}})")),
            ],
            empty=_NO_RUN,
            labels=("run", "rank", "optimizer", "policy"),
            hidden=("uid",),
            units={"clipped": "percentunit", "last step": "s"},
            links={"run": [link("Run", _TO_THE_RUN), link("gradwatch's own page",
                                "${ui:raw}/run?run=uid:${__data.fields.uid}", new_tab=True)]},
        ),
        curves(8, "Clip ratio, of five minutes", [over_time(f"{RECORDED}{{{_ALL}}}", _SERIES)],
               "percentunit", empty="no run takes steps", band=BAND,
               says="The band is 10 to 30 %."),
        curves(9, "Gradient norm before clipping, the greatest of a minute",
               [over_time(f"gradwatch_max_grad_norm_pre_clip{{{_ALL}}}", _SERIES)],
               "short", empty=_NO_RUN, log=True),
        curves(10, "Loss, the last finite one", [over_time(f"gradwatch_loss{{{_ALL}}}", _SERIES)],
               "short", empty="no run has logged a loss: agent.log(loss=loss)"),
        curves(11, "Steps a second",
               [over_time(f"rate(gradwatch_steps_total{{{_ALL}}}[{_RATE}])", _SERIES)],
               "short", empty=_NO_RUN),
        rows(12, "Alerts that fire", [("", now(_with_panels(_ALERTS)))], empty="none",
             labels=("alertname", "run", "rank", "finding", "severity"), units={}, hidden=("dashboard", "panel"),
             links={"alertname": [link("What it is about",
                    f"/d/${{__data.fields.dashboard}}?{_OF_THE_ROW}"
                    "&viewPanel=${__data.fields.panel}&${__url_time_range}")]}),
    ):  # fmt: skip
        made.with_panel(panel)
    return made


def run() -> Dashboard:
    """One run: what its gradients do, and what the monitor says of it."""
    made = _dashboard("gradwatch-run", "gradwatch: run", several=False)
    made.link(
        link("gradwatch's own page", "${ui:raw}/run?run=name:${run:percentencode}", new_tab=True)
    )
    norm = "gradwatch_last_grad_norm"
    bucket = f"sum by (le) (rate(gradwatch_grad_norm_pre_clip_bucket{{{_ONE}}}[{_RATE}]))"
    for panel in (
        figure(1, "Steps", now(f"sum(gradwatch_steps_total{{{_ONE}}})"), "short", empty=_NO_RUN,
               span=3),
        figure(2, "Clipped, of the time shown",
               now(f"sum(increase(gradwatch_clipped_steps_total{{{_ONE}}}[$__range])) / "
                   f"(sum(increase(gradwatch_finite_gradient_steps_total{{{_ONE}}}[$__range])) > 0)"),
               "percentunit", empty="no steps", span=3,
               says="Of the steps with a finite gradient."),
        figure(3, "Threshold", now(f"max(gradwatch_clip_threshold{{{_ONE}}})"), "short",
               empty="none of its own", span=3),
        figure(4, "Recommended", now('max(gradwatch_recommended_threshold{run="$run"})'), "short",
               empty="no monitor", span=3,
               says="By `gradwatch monitor`; the reasons: `gradwatch recommend`."),
        figure(5, "Loss, the last finite one", now(f"max(gradwatch_loss{{{_ONE}}})"), "short",
               empty="not logged", span=3),
        figure(18, "Since the last finite loss",
               now(f"time() - max(gradwatch_last_finite_loss_timestamp_seconds{{{_ONE}}})"), "s",
               empty="not logged", span=3),
        figure(6, "Since the last step",
               now(f"time() - max(gradwatch_last_step_timestamp_seconds{{{_ONE}}})"), "s",
               empty=_NO_RUN, span=3),
        figure(19, "Stalled from", now(f"max(gradwatch_stalled_after_seconds{{{_ONE}}})"), "s",
               empty="too few steps", span=3, says="So long without a step, by its own step times."),
        curves(7, "Gradient norm",
               [
                   over_time(f"max({norm}_pre_clip{{{_ONE}}})", "before clipping, the last"),
                   over_time(f"max(gradwatch_max_grad_norm_pre_clip{{{_ONE}}})",
                             "before clipping, the greatest of a minute"),
                   over_time(f"max({norm}_post_clip{{{_ONE}}})", "after clipping, the last"),
                   over_time(f"max(gradwatch_clip_threshold{{{_ONE}}})", "threshold"),
                   over_time('max(gradwatch_recommended_threshold{run="$run"})', "recommended"),
                   # Without steps a quantile is NaN: no comparison holds of that.
                   over_time(f"histogram_quantile(0.5, {bucket}) >= 0", "before clipping, median"),
                   over_time(f"histogram_quantile(0.99, {bucket}) >= 0", "before clipping, 99 %"),
               ],
               "short", empty=_NO_RUN, log=True, dashed="threshold|recommended"),
        curves(8, "Clip ratio, of five minutes",
               [
                   over_time(f"{RECORDED}{{{_ONE}}}", "clipped"),
                   over_time('max(gradwatch_predicted_clip_ratio{run="$run"})',
                             "predicted at the recommended threshold"),
               ],
               "percentunit", empty="it takes no steps", band=BAND, dashed="predicted.*",
               says="The band is 10 to 30 %."),
        curves(9, "Loss",
               [
                   over_time(f"max(gradwatch_loss{{{_ONE}}})", "the last finite one"),
                   over_time(f"max(gradwatch_max_loss{{{_ONE}}})", "the greatest of a minute"),
               ],
               "short", empty="not logged: agent.log(loss=loss)"),
        curves(10, "Learning rate", [over_time(f"max(gradwatch_learning_rate{{{_ONE}}})", "lr")],
               "sci", empty=_NO_RUN),
        curves(11, "Loss scale", [over_time(f"max(gradwatch_loss_scale{{{_ONE}}})", "loss scale")],
               "short", empty="no loss scaler", log=True),
        curves(12, "Steps a second",
               [over_time(f"sum(rate(gradwatch_steps_total{{{_ONE}}}[{_RATE}]))", "steps a second")],
               "short", empty=_NO_RUN),
        curves(13, "Steps with NaN or inf, left out, without a gradient; spikes",
               [
                   over_time(_count("nonfinite_steps"), "NaN or inf in a gradient"),
                   over_time(_count("nonfinite_loss_steps"), "loss of NaN or inf"),
                   over_time(_count("skipped_steps"), "not applied"),
                   over_time(_count("amp_overflow_steps"), "overflow of the loss scaler"),
                   over_time(_count("no_gradient_steps"), "no gradient"),
                   over_time(_count("grad_norm_spikes"), "spike of the norm"),
                   over_time(_count("loss_spikes"), "spike of the loss"),
               ],
               "short", empty=_NO_RUN, bars=True),
        heat(14, "Norms before clipping",
             over_time(f"sum by (le) (increase(gradwatch_grad_norm_pre_clip_bucket{{{_ONE}}}[{_RATE}]))", ""),
             empty="it takes no steps"),
        heat(15, "Norms after clipping",
             over_time(f"sum by (le) (increase(gradwatch_grad_norm_post_clip_bucket{{{_ONE}}}[{_RATE}]))", ""),
             empty="it takes no steps"),
        rows(16, "Findings",
             [("critical", now('max by (finding) (gradwatch_finding_critical{run="$run"}) '
                               'and on (finding) gradwatch_finding_active{run="$run"} == 1'))],
             empty="none, or no monitor", labels=("finding",), units={"critical": "bool_yes_no"},
             span=12, height=6,
             links={"finding": [link("What it rests on, and what to do",
                                     "${ui:raw}/run?run=name:${run:percentencode}", new_tab=True)]}),
        rows(17, "Who it is", [("", now(f"max by ({', '.join(_WHO)}) (gradwatch_run_info{{{_ONE}}})"))],
             empty=_NO_RUN, labels=_WHO, units={}, height=5),
    ):  # fmt: skip
        made.with_panel(panel)
    return made


def agent() -> Dashboard:
    """How gradwatch itself does: what it costs, whether it loses anything, whether it answers."""
    made = _dashboard("gradwatch-agent", "gradwatch: agent health", several=True)
    mine = f"and on (job, instance, process) gradwatch_steps_total{{{_ALL}}}"
    gone = (
        f"last_over_time(gradwatch_run_active{{{_ALL}}}[1d]) == 1 "
        f"and on (job, instance, process) ({SILENT}) "
        "unless on (uid) gradwatch_run_active == 1"
    )
    for panel in (
        figure(1, "Exporters that answer", now(f"count(up == 1 {mine})"), "short", empty="none", span=5),
        figure(2, "Runs whose exporter does not", now(f"count({gone})"), "short", empty="0", bad_from=1, span=5,
               says="Of a run that went on when it was last seen, within a day."),
        figure(3, "Records not stored yet", now(f"sum(gradwatch_recorder_backlog_records{{{_ALL}}})"),
               "short", empty=_NO_RUN, span=5),
        figure(4, "Of a step's time",
               now(f"sum(rate(gradwatch_overhead_seconds_total{{{_ALL}}}[{_RATE}])) / "
                   f"(sum(rate(gradwatch_steps_total{{{_ALL}}}[{_RATE}])) > 0)"), "s",
               empty="no steps", span=5, says="On the training thread: measuring, clipping, recording."),
        figure(12, "Runs left out", now("sum(gradwatch_runs_not_exported)"), "short", empty="0", span=4,
               says="More than GRADWATCH_METRICS_RUNS are in one process; all are in the store."),
        curves(5, "Records not stored yet",
               [over_time(f"gradwatch_recorder_backlog_records{{{_ALL}}}", _SERIES)], "short",
               empty=_NO_RUN),
        curves(6, "Records lost",
               [over_time("sum by (run, rank, reason) "
                          f"(increase(gradwatch_dropped_records_total{{{_ALL}}}[{_RATE}]))",
                          "{{run}} (rank {{rank}}): {{reason}}")],
               "short", empty=_NO_RUN, bars=True),
        curves(7, "Of the training thread's time",
               [over_time(f"rate(gradwatch_overhead_seconds_total{{{_ALL}}}[{_RATE}])", _SERIES)],
               "percentunit", empty=_NO_RUN,
               says="Measuring and clipping included, which a loop without gradwatch does itself."),
        curves(8, "Scrapes", [over_time(f"scrape_duration_seconds {mine}", "{{instance}}")], "s",
               empty=_NO_RUN),
        curves(9, "Since the last step",
               [over_time(f"time() - gradwatch_last_step_timestamp_seconds{{{_ALL}}}", _SERIES)],
               "s", empty=_NO_RUN),
        rows(10, "Versions", [("runs", now(f"count by (gradwatch, torch) (gradwatch_run_info{{{_ALL}}})"))],
             empty=_NO_RUN, labels=("gradwatch", "torch"), units={}, span=12),
        rows(11, "Runs whose exporter does not answer",
             [("", now(f"max by (run, rank, process, instance) ({gone})"))], empty="none",
             labels=("run", "rank", "process", "instance"), units={}, span=12),
    ):  # fmt: skip
        made.with_panel(panel)
    return made


def _each(expression: str) -> str:
    """One value a run and rank, whatever exporter had it last."""
    return f"max by (run, rank) ({expression})"


def _count(name: str) -> str:
    return f"sum(increase(gradwatch_{name}_total{{{_ONE}}}[{_RATE}]))"


def _with_panels(alerts: str) -> str:
    """The alerts, with labels that say which panel shows what each is about."""
    labelled = f"max by (alertname, run, rank, finding, severity) ({alerts})"
    for alert, (dashboard, panel) in PANELS_OF_ALERTS.items():
        for label, value in (("dashboard", dashboard), ("panel", panel)):
            labelled = f'label_replace({labelled}, "{label}", "{value}", "alertname", "{alert}")'
    return labelled


def _dashboard(uid: str, title: str, *, several: bool) -> Dashboard:
    """An empty one, with its variables and the way to the others."""
    made = (
        Dashboard(title)
        .uid(uid).tags(["gradwatch"]).timezone("browser").refresh("15s").time("now-1h", "now")
        .editable()
    )  # fmt: skip
    made.annotation(marks("Alerts", _ALERTS, "{{alertname}}: {{run}} (rank {{rank}})"))
    source = DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    source.current(VariableOption(text="gradwatch", value=DATA_SOURCE))
    made.with_variable(source)
    runs = _values("run", "Run", "gradwatch_steps_total")
    if several:
        runs.multi(True).include_all(True).all_value(".*")
    made.with_variable(runs)
    ranks = _values("rank", "Rank", 'gradwatch_steps_total{run=~"$run"}')
    made.with_variable(ranks.multi(True).include_all(True).all_value(".*"))
    made.with_variable(
        TextBoxVariable("ui").label("gradwatch ui").default_value("http://127.0.0.1:8501")
    )
    for other, name in (
        ("gradwatch-overview", "Overview"), ("gradwatch-run", "Run"), ("gradwatch-agent", "Agent"),
    ):  # fmt: skip
        if other != uid:
            made.link(link(name, f"/d/{other}?${{run:queryparam}}&${{__url_time_range}}"))
    return made


def _values(name: str, label: str, of: str) -> QueryVariable:
    return (
        QueryVariable(name).label(label).datasource(SOURCE)
        .query({"query": f"label_values({of}, {name})", "refId": "values"})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )  # fmt: skip


_MAKE = {"overview": overview, "run": run, "agent": agent}


def _unknown_names(text: str) -> set[str]:
    """Names of series in this text that nobody exports or records."""
    asked = set(re.findall(r"\b(?:run:)?gradwatch_\w+(?::\w+)?", text))
    histograms = {name for name, metric in BY_NAME.items() if metric.type == "histogram"}
    return {name for name in asked if name.removesuffix("_bucket") not in histograms} - {
        *BY_NAME,
        RECORDED,
    }


def texts() -> Iterator[tuple[Path, str]]:
    """Each dashboard's file, and what it is to hold."""
    for name, make in _MAKE.items():
        made = json.loads(json.dumps(make().build(), cls=JSONEncoder))
        for its in made["links"]:
            del its["placement"]  # in the bar, not in the menu behind it
        text = json.dumps(made, indent=2, ensure_ascii=False) + "\n"
        if unknown := _unknown_names(text):
            msg = f"{name}: nobody exports {', '.join(sorted(unknown))}"
            raise ValueError(msg)
        yield _HERE / f"{name}.json", text


def main() -> int:
    """Write or check every dashboard; the exit status."""
    check = "--check" in sys.argv[1:]
    stale = []
    for path, text in texts():
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(path.name)
    if stale:
        print(f"out of date, run `make docs`: {', '.join(stale)}", file=sys.stderr)  # noqa: T201
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
