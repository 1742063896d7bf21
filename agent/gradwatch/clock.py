"""Where time comes from."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """A wall clock and one that never goes back. `testing.ManualClock` is set by hand."""

    def time(self) -> float:
        """Unix seconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back, from no particular origin."""
        ...


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.perf_counter)
    time = staticmethod(time.time)
