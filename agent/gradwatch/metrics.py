"""Every Prometheus metric: name, type, unit, meaning. Exporter, dashboards and docs read this."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = [
    "AGENT",
    "BY_NAME",
    "DROP_REASONS",
    "EXPORTER",
    "LABELS",
    "MONITOR",
    "NORM_BUCKETS",
    "PEAK_SECONDS",
    "RUNS_NOT_EXPORTED",
    "Metric",
]

LABELS = ("run", "rank")

# Why a record did not reach the store: the ring was full and it was overwritten; it was found
# torn; gradwatch itself failed on that step; or it was left out evenly, because the job takes steps
# faster than the store takes records. "events" counts 512-byte blocks of events.
DROP_REASONS = ("ring_full", "torn", "error", "events", "thinned")

# Upper bounds of the norm histograms: four a decade from 1e-4 to 1e4.
NORM_BUCKETS = tuple(float(f"{10 ** (k / 4):.6g}") for k in range(-16, 17))

PEAK_SECONDS = 60  # for so long at least a greatest value is exported


class Metric(NamedTuple):
    """One metric family. `labels` come after `LABELS`."""

    name: str
    type: Literal["counter", "gauge", "histogram", "info"]
    meaning: str
    labels: tuple[str, ...] = ()


AGENT = (
    Metric("gradwatch_steps_total", "counter", "Optimizer steps seen."),
    Metric(
        "gradwatch_finite_gradient_steps_total",
        "counter",
        "Of these, with a finite gradient norm: the clip ratio is over them.",
    ),
    Metric("gradwatch_clipped_steps_total", "counter", "Of these, clipped."),
    Metric(
        "gradwatch_nonfinite_steps_total", "counter", "Of these, with a NaN or inf in a gradient."
    ),
    Metric(
        "gradwatch_no_gradient_steps_total",
        "counter",
        "Of these, in which no parameter had a gradient: they have no norm.",
    ),
    Metric(
        "gradwatch_nonfinite_loss_steps_total", "counter", "Of these, with a loss of NaN or inf."
    ),
    Metric("gradwatch_skipped_steps_total", "counter", "Of these, not applied."),
    Metric(
        "gradwatch_amp_overflow_steps_total",
        "counter",
        "Of these, suppressed by the loss scaler after an overflow.",
    ),
    Metric(
        "gradwatch_grad_norm_spikes_total",
        "counter",
        "Spikes of the gradient norm: one for each event `grad_norm_spike`.",
    ),
    Metric(
        "gradwatch_loss_spikes_total",
        "counter",
        "Spikes of the loss: one for each event `loss_spike`.",
    ),
    Metric(
        "gradwatch_grad_norm_pre_clip", "histogram", "Gradient norm before clipping, finite ones."
    ),
    Metric(
        "gradwatch_grad_norm_post_clip",
        "histogram",
        "Gradient norm the optimizer used, finite ones.",
    ),
    Metric(
        "gradwatch_last_grad_norm_pre_clip", "gauge", "Last finite gradient norm before clipping."
    ),
    Metric(
        "gradwatch_last_grad_norm_post_clip", "gauge", "Last finite gradient norm after clipping."
    ),
    Metric(
        "gradwatch_max_grad_norm_pre_clip",
        "gauge",
        f"Greatest finite gradient norm before clipping of the last {PEAK_SECONDS} to "
        f"{PEAK_SECONDS * 5 // 4} seconds, so that a scrape every {PEAK_SECONDS} seconds sees each "
        "peak; absent where there was none.",
    ),
    Metric("gradwatch_clip_threshold", "gauge", "Threshold of the gradient norm in force."),
    Metric("gradwatch_learning_rate", "gauge", "Learning rate of the first parameter group."),
    Metric("gradwatch_loss", "gauge", "Last finite loss."),
    Metric(
        "gradwatch_max_loss",
        "gauge",
        f"Greatest finite loss of the last {PEAK_SECONDS} to {PEAK_SECONDS * 5 // 4} seconds; "
        "absent where there was none.",
    ),
    Metric(
        "gradwatch_last_finite_loss_timestamp_seconds",
        "gauge",
        "Unix time of the last step whose loss was finite.",
    ),
    Metric("gradwatch_loss_scale", "gauge", "Loss scale of mixed-precision training."),
    Metric(
        "gradwatch_last_step_timestamp_seconds", "gauge", "Unix time of the last optimizer step."
    ),
    Metric(
        "gradwatch_stalled_after_seconds",
        "gauge",
        "Seconds without a step from which on the run counts as stalled: ten times its usual step "
        "time, one and a half times its longest pause so far, and 30 at least.",
    ),
    Metric(
        "gradwatch_run_active",
        "gauge",
        "1 while the run goes on, 0 for a quarter of an hour after it has ended well.",
        ("uid",),
    ),
    Metric(
        "gradwatch_recorder_backlog_records", "gauge", "Records in the ring, not in the store yet."
    ),
    Metric(
        "gradwatch_dropped_records_total",
        "counter",
        f"Records lost to the store, by reason ({', '.join(DROP_REASONS)}).",
        ("reason",),
    ),
    Metric(
        "gradwatch_overhead_seconds_total",
        "counter",
        "Time the training thread spent measuring, clipping and recording.",
    ),
    Metric(
        "gradwatch_run_info",
        "info",
        "Who the run is.",
        ("uid", "host", "optimizer", "policy", "gradwatch", "torch"),
    ),
)

# Once an exporter, with its own labels alone.
EXPORTER = Metric(
    "gradwatch_exporter_info",
    "info",
    "Which process answers, as host and pid; not always the one whose target file names the address.",
    ("answering",),  # no label of a target, as `process` is
)

# Also once an exporter.
RUNS_NOT_EXPORTED = Metric(
    "gradwatch_runs_not_exported",
    "gauge",
    "Runs that go on, or ended in the last quarter of an hour, and have no series but "
    "`gradwatch_run_active`: more than GRADWATCH_METRICS_RUNS are in this process.",
)

MONITOR = (
    Metric(
        "gradwatch_recommended_threshold",
        "gauge",
        "Threshold that should clip the target, where one is recommended.",
    ),
    Metric("gradwatch_predicted_clip_ratio", "gauge", "Clip ratio predicted at that threshold."),
    Metric("gradwatch_finding_active", "gauge", "1 while a finding holds.", ("finding",)),
    Metric(
        "gradwatch_finding_critical",
        "gauge",
        "1 while a finding holds and its severity is critical, else 0.",
        ("finding",),
    ),
)

BY_NAME = {metric.name: metric for metric in (*AGENT, EXPORTER, RUNS_NOT_EXPORTED, *MONITOR)}
