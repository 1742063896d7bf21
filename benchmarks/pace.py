"""Steps at a pace, as a training loop takes them: the thread computes in between, it never sleeps.

A thread that sleeps pays for waking up what a job never pays; one that does nothing in between
keeps caches warm that a job's own work evicts.
"""

from __future__ import annotations

import time

import torch


class Work:
    """Matrix products on one thread's worth of data (1 MB, more than a core's second cache)."""

    def __init__(self) -> None:
        self._left, self._right = torch.randn(2, 300, 300)
        self._product = torch.empty(300, 300)

    def until(self, deadline: float) -> None:
        """Compute until then, by `time.perf_counter`; once at least."""
        torch.mm(self._left, self._right, out=self._product)
        while time.perf_counter() < deadline:
            torch.mm(self._left, self._right, out=self._product)
