"""What a sick run's scrape shows: losses, spikes, peaks and its pace, against what was done to it."""

import collections
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import one_parameter
from prometheus_client.parser import text_string_to_metric_families
from stores import batch

from gradwatch import Agent, metrics
from gradwatch.recorder import FLAGS
from gradwatch.sinks.prometheus import PrometheusSink
from gradwatch.sinks.series import Peak
from gradwatch.testing import ManualClock, MemorySink, run_info


def of_run(sink, run="test"):
    """The values of one run, by Prometheus' own parser: name → value, without the buckets."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(sink.exposition())
        for sample in family.samples
        if sample.labels.get("run") == run and "le" not in sample.labels
    }


def train(losses, norms):
    """A run with these losses and gradient norms: what is exported, and the events on record."""
    weight, optimizer = one_parameter(size=1, lr=0.0)
    sink = MemorySink()
    agent = Agent(optimizer, store=sink, run="test")
    for loss, norm in zip(losses, norms, strict=True):
        weight.grad = torch.tensor([norm], dtype=torch.float32)
        agent.log(loss=loss)
        optimizer.step()
    assert agent.flush()
    exported = of_run(agent._recording.pipeline.metrics)
    kinds = collections.Counter(event.kind for event in sink.events)
    return exported, kinds, sink


def noise(count, seed=0):
    return np.random.default_rng(seed).uniform(0.8, 1.2, count)


def test_a_loss_of_nan_with_finite_gradients_is_counted():
    """The gradients count as finite, the loss as what it is, and its last finite value has an age."""
    losses = [*noise(100), *([math.nan] * 30)]
    exported, kinds, sink = train(losses, noise(130, seed=1))
    assert kinds["nonfinite_loss"] == 5  # of the 1st, 2nd, 4th, 8th and 16th in a row
    assert exported["gradwatch_nonfinite_loss_steps_total"] == 30
    assert exported["gradwatch_nonfinite_steps_total"] == 0
    assert exported["gradwatch_finite_gradient_steps_total"] == 130
    assert exported["gradwatch_loss"] == losses[99]
    assert exported["gradwatch_max_loss"] == max(losses[:100])
    assert exported["gradwatch_last_finite_loss_timestamp_seconds"] == sink.steps[99].time
    assert exported["gradwatch_last_step_timestamp_seconds"] == sink.steps[129].time


def test_a_loss_that_was_never_finite_has_no_value():
    """Neither a last, nor a greatest, nor a time."""
    exported, _, _ = train([math.inf] * 20, noise(20))
    assert exported["gradwatch_nonfinite_loss_steps_total"] == 20
    assert not {name for name in exported if "loss" in name and not name.endswith("_total")}


def test_spikes_are_counted_as_the_events_on_record_tell_them():
    """One step of norm 500 and one of loss 90 are one each, and show as the greatest values."""
    norms, losses = noise(200), noise(200, seed=1)
    norms[150] = 500.0
    losses[120] = 90.0
    exported, kinds, _ = train(losses, norms)
    assert kinds["grad_norm_spike"] == kinds["loss_spike"] == 1
    assert exported["gradwatch_grad_norm_spikes_total"] == 1
    assert exported["gradwatch_loss_spikes_total"] == 1
    assert exported["gradwatch_max_grad_norm_pre_clip"] == 500.0
    assert exported["gradwatch_max_loss"] == 90.0
    assert exported["gradwatch_last_grad_norm_pre_clip"] < 2.0


def test_steps_with_nan_in_the_gradient_are_none_of_the_clip_ratio():
    """Clipped steps over steps with a finite norm, as numpy counts them."""
    norms = 2.0 * noise(100)
    norms[::2] = math.nan
    exported, _, sink = train([1.0] * 100, norms)
    finite = np.isfinite([step.pre_norm for step in sink.steps])
    assert exported["gradwatch_finite_gradient_steps_total"] == finite.sum() == 50
    assert exported["gradwatch_clipped_steps_total"] == 50
    assert exported["gradwatch_nonfinite_steps_total"] == 50


def test_steps_without_gradient_are_counted_apart():
    """They have no norm, so they are neither finite nor NaN."""
    sink = PrometheusSink()
    run = sink.open(run_info())
    sink.write(run, batch(0, 5, pre_norm=1.0))
    sink.write(run, batch(5, 3, pre_norm=math.nan, flags=FLAGS.NO_GRADIENT))
    exported = of_run(sink)
    assert exported["gradwatch_no_gradient_steps_total"] == 3
    assert exported["gradwatch_finite_gradient_steps_total"] == 5
    assert exported["gradwatch_nonfinite_steps_total"] == 0


arrivals = st.lists(st.tuples(st.floats(0.01, 40.0), st.floats(-1e3, 1e6)), min_size=1, max_size=40)


@given(arrivals, st.floats(0.0, 200.0))
def test_a_peak_is_seen_for_a_minute_and_no_longer_than_a_quarter_more(gaps, later):
    """Whenever it is asked for, against a list of all values with their times."""
    peak, now, came = Peak(), 0.0, []
    for gap, value in gaps:
        now += gap
        peak.add(value, now)
        came.append((now, value))
    now += later
    must = [value for when, value in came if now - when < metrics.PEAK_SECONDS]
    may = [value for when, value in came if now - when <= 1.25 * metrics.PEAK_SECONDS]
    seen = peak.value(now)
    if must:
        assert seen >= max(must)
    if not may:
        assert seen is None
    elif seen is not None:
        assert seen <= max(may)


@pytest.mark.parametrize("interval", [5, 15, 30, 60])
def test_two_scrapers_both_see_a_peak_of_one_step(interval):
    """Asking takes nothing away from whoever asks next."""
    clock = ManualClock()
    sink = PrometheusSink(clock.monotonic)
    run = sink.open(run_info())
    seen = [[], []]
    for second in range(600):
        clock.advance(1)
        norm = 500.0 if second == 301 else 1.4
        sink.write(run, batch(second, 1, time=clock.time(), pre_norm=norm))
        for scraper, late in enumerate((0, 7)):
            if second % interval == late % interval:
                seen[scraper].append(of_run(sink)["gradwatch_max_grad_norm_pre_clip"])
    for values in seen:
        assert max(values) == 500.0
        assert values.count(500.0) <= 76 / interval + 1


def test_the_peak_of_an_idle_run_is_unknown():
    """What was greatest a while ago says nothing of now."""
    clock = ManualClock()
    sink = PrometheusSink(clock.monotonic)
    run = sink.open(run_info())
    sink.write(run, batch(0, 1, time=clock.time(), pre_norm=3.0, loss=2.0))
    assert of_run(sink)["gradwatch_max_loss"] == 2.0
    clock.advance(76)
    exported = of_run(sink)
    assert "gradwatch_max_loss" not in exported
    assert "gradwatch_max_grad_norm_pre_clip" not in exported
    assert exported["gradwatch_loss"] == 2.0


def test_after_how_long_it_counts_as_stalled_is_exported_from_the_second_step_on():
    """By the step times in the records; a pause between two attempts is none of the loop."""
    sink = PrometheusSink()
    run = sink.open(run_info())
    sink.write(run, batch(0, 1, time=100.0))
    assert "gradwatch_stalled_after_seconds" not in of_run(sink)
    sink.write(run, batch(1, 200, time=100.0 + 5.0 * np.arange(1, 201)))
    assert of_run(sink)["gradwatch_stalled_after_seconds"] == 50.0
    sink.close(run, None)
    sink.open(run_info(ring="again"))  # after three hours
    sink.write(run, batch(201, 50, time=12_000.0 + 5.0 * np.arange(50)))
    assert of_run(sink)["gradwatch_stalled_after_seconds"] == 50.0
    sink.write(run, batch(251, 1, time=12_000.0 + 5.0 * 49 + 200.0))  # an evaluation
    assert of_run(sink)["gradwatch_stalled_after_seconds"] == 300.0


def test_what_names_hold_is_escaped_as_prometheus_wants():
    """A run called after anything at all is read back as it is called."""
    name = 'a "b" \\ {c} %d %% \n é'
    sink = PrometheusSink()
    run = sink.open(run_info(name=name))
    sink.write(run, batch(0, 3, pre_norm=1.0))
    exported = of_run(sink, run=name)
    assert exported["gradwatch_steps_total"] == 3
    assert exported["gradwatch_grad_norm_pre_clip_count"] == 3
