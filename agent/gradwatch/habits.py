"""Habits of a training loop that hide the truth from the hook, seen in the records alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from gradwatch.recorder import FLAGS
from gradwatch.records import Finding

__all__ = ["ClippedAfterStep", "ClippedTwice", "NotZeroed"]


class _Flagged(ABC):
    """Recognises a habit by steps that carry a flag: said once a run, of the last of `FROM` such steps."""

    FLAG: ClassVar[int]
    FROM: ClassVar[int]

    def __init__(self) -> None:
        self._steps: list[int] = []

    def observe(self, steps: np.ndarray[Any, np.dtype[np.void]]) -> Finding | None:
        """Take in new records; the finding, the first time there is one."""
        if len(self._steps) >= self.FROM:
            return None
        flagged = steps["step"][(steps["flags"] & self.FLAG) != 0]
        self._steps.extend(flagged[: self.FROM - len(self._steps)].tolist())
        return self._finding(self._steps) if len(self._steps) >= self.FROM else None

    @abstractmethod
    def _finding(self, steps: list[int]) -> Finding:
        """What is to be said of these steps."""


class ClippedAfterStep(_Flagged):
    """A loop that clips after `step()`."""

    FLAG, FROM = FLAGS.CLIPPED_LATE, 10

    def _finding(self, steps: list[int]) -> Finding:
        return Finding(
            "clip_after_step",
            "warning",
            steps[0] - 1,
            steps[-1] - 1,
            f"the loop clips after step(): in {self.FROM} steps that were looked at, the gradients "
            "were clipped when they had been applied already, so that clipping did nothing.",
            "Take the loop's own clip_grad_norm_ or clip_grad_value_ out and let gradwatch clip, or "
            "call it between backward() and step().",
            {"steps": self.FROM, "source": "torch.nn.utils.clip_grad_norm_: before step()"},
        )


class NotZeroed(_Flagged):
    """A loop without `zero_grad()`."""

    FLAG, FROM = FLAGS.ADDED_TO, 3

    def _finding(self, steps: list[int]) -> Finding:
        return Finding(
            "gradients_not_zeroed",
            "critical",
            steps[0],
            steps[-1],
            f"the gradients are not zeroed: in {self.FROM} steps that were looked at, the gradient was "
            "that of the step before, as it was applied, with the new one added to it, so that a step "
            "follows the batches before it as well.",
            "Call optimizer.zero_grad() once a step, before backward() or after step(). To add up "
            "several batches, call step() and zero_grad() once after all of them.",
            {"steps": self.FROM, "source": "torch.optim.Optimizer.zero_grad"},
        )


class ClippedTwice:
    """Recognises a loop that clips before `step()`: the norms the hook sees end at a wall.

    `clip_grad_norm_(c)` leaves every norm n above c at c·n/(n + 1e-6): within 1e-6 (and rounding)
    of one greatest value, which natural norms do not share. Said when, of the last 50 finite norms
    (10 at least),

    - at least 3 lie at that wall, and more of them than in the strip of 0.2 % below it (natural
      norms thin out gradually),
    - each of these gradients was changed in place after the backward pass, and
    - they neither are all the same number nor creep one way (a gradient that hardly changes).

    Says so once a run. Looks at every record, and forgets all but the last 50.
    """

    WINDOW = 50
    FROM = 10
    AT_LEAST = 3
    ROUNDING = 3e-6
    EPSILON = 1.5e-6  # torch's 1e-6, and rounding
    STRIP = 2e-3
    LEAST_SET = 1e-3  # thresholds that people set are greater

    def __init__(self) -> None:
        self._recent = np.empty(0, dtype=[("step", "i8"), ("norm", "f8"), ("modified", "?")])
        self._said = False

    def observe(self, steps: np.ndarray[Any, np.dtype[np.void]]) -> Finding | None:
        """Take in new records; the finding, the first time there is one."""
        if self._said or not len(steps):
            return None
        new = np.empty(len(steps), dtype=self._recent.dtype)
        new["step"], new["norm"] = steps["step"], steps["pre_norm"]
        new["modified"] = (steps["flags"] & FLAGS.MODIFIED) != 0
        seen = np.concatenate([self._recent, new[np.isfinite(new["norm"])]])
        # A batch may be longer than the window: look at each window's worth in turn.
        for end in range(min(len(seen), self.WINDOW), len(seen) + self.WINDOW, self.WINDOW):
            finding = self._look(seen[max(0, min(end, len(seen)) - self.WINDOW) : end])
            if finding is not None:
                self._said = True
                return finding
        self._recent = seen[-self.WINDOW :]
        return None

    @classmethod
    def at_wall(cls, norms: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of these norms lie where the greatest does, if a loop clipped at it."""
        return np.asarray(norms >= norms.max(initial=0.0) * (1 - cls.ROUNDING) - cls.EPSILON)

    @classmethod
    def shows(cls, norms: np.ndarray[Any, Any]) -> bool:
        """Whether as many of these norms lie there as a loop that clips leaves."""
        return int(np.count_nonzero(cls.at_wall(norms))) >= cls.AT_LEAST

    def _look(self, window: np.ndarray[Any, Any]) -> Finding | None:
        norms = window["norm"]
        top = norms.max(initial=0.0)
        wall = window[self.at_wall(norms)]
        strip = np.count_nonzero(norms >= top * (1 - self.STRIP)) - len(wall)
        moves = np.diff(wall["norm"])
        if (
            len(window) < self.FROM
            or top <= 0.0
            or len(wall) < self.AT_LEAST
            or len(wall) <= strip
            or not wall["modified"].all()
            or (moves >= 0).all()
            or (moves <= 0).all()
        ):
            return None
        limit = float(f"{top:.3g}")
        advice = (
            f"Take the loop's own clip_grad_norm_(…, {limit:g}) out (in Lightning gradient_clip_val, "
            "in transformers' Trainer max_grad_norm) and let gradwatch clip: "
            f"gradwatch.wrap(optimizer, clip=gradwatch.ClipNorm({limit:g})). Where the loop uses "
            "the norm, agent.clip() returns it."
            if limit >= self.LEAST_SET
            else "A number that small is none that is set: the loop clips gradients that still carry "
            "the scaler's loss scale. Call scaler.unscale_(optimizer) before it, or take the loop's "
            "clip out and let gradwatch clip at the same threshold, with wrap(..., scaler=scaler)."
        )
        return Finding(
            "clipped_twice",
            "warning",
            int(wall["step"][0]),
            int(wall["step"][-1]),
            f"the loop clips by itself before step(): when it was seen, {len(wall)} of "
            f"{len(window)} gradient norms were exactly {limit:g} and none greater. The true norms "
            "are not seen.",
            advice,
            {
                "limit": float(top),
                "clipped": len(wall),
                "window": len(window),
                "source": "torch.nn.utils.clip_grad_norm_: once, on the gradients as they are",
            },
        )
