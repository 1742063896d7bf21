"""A run → what is wrong with it now, each finding with the steps and numbers it rests on."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gradwatch.habits import ClippedTwice
from gradwatch_monitor.diagnosis import RULES, Sign, Window
from gradwatch_monitor.diagnosis.window import BadWeights, LayerSamples
from gradwatch_monitor.rows import Event, Finding
from gradwatch_monitor.stalls import as_finding, stall_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from gradwatch_monitor.store import Store

__all__ = ["OF_THE_AGENT", "concluded", "diagnose", "ended", "signs", "window_of"]

_Named = TypeVar("_Named", Finding, Sign)

WINDOW = 2000  # steps that the rules look at
START = 200  # and of the run's beginning
_ENOUGH = 500  # steps, or norms, that show what a loop does
OPENS, STAYS = 1.0, 0.7  # a finding's strength: so it does not come and go with every step
# The others say all that the first does: most steps, a wall of norms under a loss scale. Where the
# loop clips before, what the agent clips means nothing; nor where gradients add up. And nothing keeps
# a run alive that is lost.
_SAID_BY = {
    "clipping_most_steps": {
        "clipping_every_step",
        "clipped_twice",
        "not_unscaled",
        "gradients_not_zeroed",
    },
    "clipping_every_step": {"clipped_twice", "not_unscaled", "gradients_not_zeroed"},
    "clipped_twice": {"not_unscaled"},
    "clipping_keeps_it_alive": {"no_convergence", "gradients_not_zeroed"},
    "norm_drift": {"gradients_not_zeroed"},
    "vanishing_gradients": {"learning_rate_too_high"},  # of units that it has saturated
    "dominating_layer": {"vanishing_gradients"},  # it is all that is left
}
OF_THE_AGENT = frozenset(
    {"clip_after_step", "clipped_twice", "gradients_not_zeroed"}
)  # seen in the job itself, and told once

_GRAVITY = {"critical": 0, "warning": 1, "info": 2}
_COLUMNS = (
    "step", "loss", "pre_norm", "post_norm", "threshold", "loss_scale", "lr", "clipped",
    "nonfinite", "nonfinite_loss", "skipped",
)  # fmt: skip


def diagnose(store: Store, run_id: int) -> list[Finding]:
    """What is wrong with a run as of its last 2,000 steps, or because it takes none; the gravest first.

    A finding that is open already (in the store, where the monitor keeps them) stays until its
    cause has clearly gone; nothing is written here.

    Args:
        store: where the run is.
        run_id: its integer id (`store.run("name").id`).

    Raises:
        RunNotFoundError: there is no such run.
    """
    before = {f.finding: f for f in concluded(store, run_id) if f.ended_at is None}
    found = [finding for name, finding in before.items() if name in OF_THE_AGENT]
    run = store.run(run_id)
    if (stall := stall_of(store, run)) is not None:
        found.append(as_finding(stall, run, before.get("stalled")))
    window = window_of(store, run_id)
    if window is not None:
        if _free_of_walls(window):  # a loop that was mended, and goes on as the same run
            found = [finding for finding in found if finding.finding != "clipped_twice"]
        seen = signs(window, before)
        found.extend(_finding(sign, before.get(sign.finding)) for sign in seen)
    return sorted(_without_repetition(found), key=lambda f: (_GRAVITY[f.severity], f.first_step))


def ended(store: Store, run_id: int, now: Sequence[Finding]) -> list[Finding]:
    """What was found before, and does not hold any more: all on record that is not there now."""
    holds = {finding.finding for finding in now}
    past = [f for f in concluded(store, run_id) if f.ended_at is not None]
    return [finding for finding in past if finding.finding not in holds]


def concluded(store: Store, run_id: int) -> list[Finding]:
    """What is on record of a run, ended or not.

    What the agent saw in a loop ended where the run was resumed, by a loop in which it has not been
    seen in as many steps as it takes.
    """
    found, last = store.findings(run_id), store.last_step(run_id)
    if last is None or not any(_in_the_loop(finding) for finding in found):
        return found
    resumed = store.events(run_id, kind="run_resumed")
    for i, finding in enumerate(found):
        since = [e.time for e in resumed if finding.last_step < e.step <= last - _ENOUGH]
        if since and _in_the_loop(finding):
            found[i] = dataclasses.replace(finding, ended_at=min(since))
    return found


def _in_the_loop(finding: Finding) -> bool:
    return finding.finding in OF_THE_AGENT and finding.ended_at is None


def signs(window: Window, open_: Collection[str] = ()) -> list[Sign]:
    """What the rules see: what is strong enough to be said, or to stay open."""
    seen = [sign for rule in RULES if (sign := rule(window)) is not None]
    said = [s for s in seen if s.strength >= (STAYS if s.finding in open_ else OPENS)]
    return _without_repetition(said)


def _free_of_walls(window: Window) -> bool:
    """Whether the last norms, enough to tell, show nothing of a loop that clips by itself."""
    norms = window.pre_norm[np.isfinite(window.pre_norm)][-_ENOUGH:]
    return len(norms) == _ENOUGH and not ClippedTwice.shows(norms)


def _without_repetition(found: Sequence[_Named]) -> list[_Named]:
    names = {one.finding for one in found}
    return [one for one in found if not names & _SAID_BY.get(one.finding, set())]


def window_of(store: Store, run_id: int) -> Window | None:
    """The window of a run as it stands in the store; None before its first step."""
    run = store.run(run_id)
    last = store.last_step(run_id)
    if last is None:
        return None
    columns = store.columns(run_id, _COLUMNS, start=last - WINDOW + 1)
    if not len(columns["step"]):
        return None
    first = store.columns(run_id, ("loss", "pre_norm"), stop=START)
    samples = store.layers(run_id)
    return Window(
        **columns,
        first_losses=first["loss"],
        first_norms=first["pre_norm"],
        layers=_layers(samples),
        settings=run.settings,
        bad_weights=_bad_weights(store.events(run_id, kind="nonfinite_weights", limit=1)),
    )


def _bad_weights(found: Sequence[Event]) -> BadWeights | None:
    if not found:
        return None
    data = found[0].data  # anybody may have written to the store
    first, names = data.get("parameter"), data.get("parameters")
    left_out, tensors = (
        value if isinstance(value := data.get(key), int) else 0
        for key in ("parameters_left_out", "tensors")
    )
    count = max(1, left_out + (len(names) if isinstance(names, dict) else 0))
    return BadWeights(found[0].step, str(first or "unknown"), count, max(count, tensors))


def _layers(samples: Sequence[tuple[int, str, float | None, float | None]]) -> LayerSamples | None:
    if not samples:
        return None
    steps = sorted({step for step, *_ in samples})
    names = list(dict.fromkeys(name for _, name, _, _ in samples))
    row, column = ({key: i for i, key in enumerate(keys)} for keys in (steps, names))
    norms = np.full((2, len(steps), len(names)), np.nan)
    for step, name, grad, weight in samples:
        norms[:, row[step], column[name]] = [
            np.nan if value is None else value for value in (grad, weight)
        ]
    return LayerSamples(np.array(steps, dtype=np.float64), names, norms[0], norms[1])


def _finding(sign: Sign, before: Finding | None) -> Finding:
    first, last = sign.steps
    return Finding(
        finding=sign.finding,
        severity=sign.severity,
        first_step=first if before is None else min(first, before.first_step),
        last_step=last,
        found_at=time.time() if before is None else before.found_at,
        ended_at=None,
        message=sign.message + ".",
        advice=sign.advice,
        data={**sign.data, "strength": round(sign.strength, 3), "source": sign.source},
    )
