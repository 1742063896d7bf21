"""Where the hooks record: a ring, and the few numbers that are kept beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gradwatch.recorder import NullRing

if TYPE_CHECKING:
    from gradwatch.control import Control
    from gradwatch.recorder import Ring

__all__ = ["NullTape", "Tape"]


class Tape(Protocol):
    """What the training thread writes to."""

    overhead: float  # seconds spent in the hooks, all steps together
    control: Control | None  # where somebody may apply another threshold while the run goes on

    @property
    def ring(self) -> Ring | NullRing:
        """The flight recorder."""
        ...

    def lose(self, reason: str, count: int = 1) -> None:
        """Count records that will not reach the store."""
        ...


class NullTape:
    """Records nothing: where recording is off, and in a forked child."""

    def __init__(self) -> None:
        self.ring = NullRing()
        self.overhead = 0.0
        self.control: Control | None = None

    def lose(self, reason: str, count: int = 1) -> None:
        """Do nothing."""
