"""One warning for a fault, however often it strikes."""

from __future__ import annotations

import logging

__all__ = ["Troubles", "logger"]

logger = logging.getLogger("gradwatch")


class Troubles:
    """One warning for a fault, however often it strikes, until it has cleared."""

    def __init__(self) -> None:
        self._open: set[str] = set()

    def report(self, fault: str, message: str) -> None:
        """Warn, unless this fault was reported and has not cleared since."""
        if fault not in self._open:
            self._open.add(fault)
            logger.warning("gradwatch: %s", message)

    def clear(self, fault: str, message: str) -> None:
        """Say that a reported fault is over."""
        if fault in self._open:
            self._open.discard(fault)
            logger.warning("gradwatch: %s", message)
