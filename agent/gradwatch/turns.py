"""Turns at the interpreter lock: the worker gets more of them while the store is far behind.

The worker releases the lock in every SQL statement, and CPython lets it wait for the switch interval,
5 ms, until it takes the lock back from a training loop that never pauses. A job of 20,000 steps a
second is stored at a third of that rate then. With 0.1 ms it is stored whole, and the loop takes as
many steps as before.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BEHIND", "Turns"]

BEHIND = 4_000  # steps that wait for the store, from which on turns are short
_SECONDS = 1e-4


class Turns:
    """The interpreter's switch interval, as the worker needs it."""

    def __init__(self) -> None:
        self._usual: float | None = None  # while it is short: what it was

    @contextlib.contextmanager
    def short(self) -> Iterator[None]:
        """Shorten the switch interval meanwhile; one that is short already stays as it is."""
        usual = sys.getswitchinterval()
        if usual > _SECONDS:
            self._usual = usual
            sys.setswitchinterval(_SECONDS)
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Make it what it was, unless somebody else has set it since. Also in a forked child."""
        usual, self._usual = self._usual, None
        if usual is not None and round(sys.getswitchinterval() / _SECONDS, 3) == 1.0:
            sys.setswitchinterval(usual)
