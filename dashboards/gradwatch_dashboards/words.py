"""What the run page and the report have in common: their words and figures."""

from __future__ import annotations

import datetime as dt
import time

__all__ = ["BAND", "BANDS", "VERDICTS", "WINDOW", "last_step", "left_out", "without_gradient"]

BAND = (0.10, 0.30)  # of the clip ratio
WINDOW = 100  # steps
BANDS = (
    "Each band is {width:,} steps: the shaded range is from the least value to the greatest, the thick "
    "line is the mean (on a log axis the geometric one), and the thin line is the last value."
)
VERDICTS = {
    "keep": "keep the threshold",
    "change": "change the threshold",
    "not_needed": "clipping is not needed",
    "use_policy": "use a policy instead of a constant",
    "fix_training": "fix the training first",
    "not_enough_data": "not enough data yet",
}

_MINUTES_FROM, _HOURS_FROM = 120.0, 7200.0  # seconds


def last_step(taken: float | None, *, going_on: bool, now: float | None = None) -> str:
    """When the last step was taken: of a run that goes on how long ago, else the moment in UTC.

    >>> last_step(1_000.0, going_on=True, now=1_095.0)
    '95 s ago'
    >>> last_step(1_000.0, going_on=True, now=2_000.0)
    '17 min ago'
    >>> last_step(1_000.0, going_on=False)
    '1970-01-01 00:16 UTC'
    """
    if taken is None:
        return "–"
    ago = (time.time() if now is None else now) - taken
    if not going_on or ago < 0:  # the clock of another machine may be ahead
        return f"{dt.datetime.fromtimestamp(taken, dt.UTC):%Y-%m-%d %H:%M} UTC"
    if ago < _MINUTES_FROM:
        return f"{ago:.0f} s ago"
    return f"{ago / 60:.0f} min ago" if ago < _HOURS_FROM else f"{ago / 3600:.0f} h ago"


def left_out(steps: int) -> str:
    """That steps have no record of their own, and what counts and ratios are of."""
    count = "1 step was" if steps == 1 else f"{steps:,} steps were"
    return (
        f"{count} left out evenly, because the job takes steps faster than the store takes records: "
        "counts and ratios are of the steps in the store; every event is in the store"
    )


def without_gradient(steps: int) -> str:
    """How many steps had no gradient; why is not known from the record."""
    count = "1 step" if steps == 1 else f"{steps:,} steps"
    return f"{count} had no gradient"
