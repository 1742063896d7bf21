"""The ranks of a distributed job: how the others learn of the run that rank 0 begins.

Over the key-value store that `torch.distributed` was set up with, never by a collective: a job in
which one rank alone is wrapped must not wait for the others.
"""

from __future__ import annotations

import contextlib
from typing import Any

__all__ = ["Peers"]


class Peers:
    """One attempt of one run, as the ranks of a process group share it."""

    def __init__(self, store: Any, ordinal: int, attempt: int) -> None:
        self._store = store
        self._key = f"gradwatch/{ordinal}/{attempt}"

    @classmethod
    def of(cls, ordinal: int, attempt: int) -> Peers | None:
        """The peers in the default process group; None where there is none.

        `ordinal` and `attempt` count the optimizers wrapped by this process and the attempts begun
        with each: the same numbers on all ranks, which run the same program.
        """
        from torch import distributed  # noqa: PLC0415 - torch is there by now; this module is not

        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        try:
            store = distributed.distributed_c10d._get_default_store()
        except (AttributeError, RuntimeError, ValueError):
            return None
        return cls(store, ordinal, attempt)

    def lead(self, ring: str) -> None:
        """On rank 0: say that the run has begun, with this flight recorder."""
        with contextlib.suppress(RuntimeError):
            self._store.set(self._key, ring)

    def leader(self) -> str | None:
        """Rank 0's flight recorder, None as long as it has not said so. Does not wait."""
        try:
            if self._store.check([self._key]):
                return str(self._store.get(self._key).decode())
        except RuntimeError:  # rank 0, which keeps the store, may be gone
            pass
        return None
