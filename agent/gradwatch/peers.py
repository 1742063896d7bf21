"""The ranks of a distributed job: how the others learn of the run that rank 0 begins.

Over the key-value store that `torch.distributed` was set up with, never by a collective: a job in
which one rank alone is wrapped must not wait for the others.
"""

from __future__ import annotations

from datetime import timedelta
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
        self.put("leader", ring)

    def leader(self) -> str | None:
        """Rank 0's flight recorder, None as long as it has not said so. Does not wait."""
        return self.look("leader")

    # Rank 0, which keeps the store, may be gone: then nothing is heard any more.

    def put(self, key: str, value: str) -> bool:
        """Tell all ranks; whether that could be done."""
        try:
            self._store.set(f"{self._key}/{key}", value)
        except RuntimeError:
            return False
        return True

    def look(self, key: str) -> str | None:
        """What a rank has put there; None as long as there is nothing. Does not wait."""
        try:
            if self._store.check([f"{self._key}/{key}"]):
                return self._get(key)
        except RuntimeError:
            pass
        return None

    def wait(self, key: str, seconds: float) -> str | None:
        """The same, once it is there; None where it is not in time."""
        try:
            self._store.wait([f"{self._key}/{key}"], timedelta(seconds=seconds))
            return self._get(key)
        except RuntimeError:
            return None

    def _get(self, key: str) -> str:
        return str(self._store.get(f"{self._key}/{key}").decode())
