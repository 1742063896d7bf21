"""Norms → Recommendation: the constant that clips the target share, and what to do about it.

No constant is reliable from one run to the next: norms depend on the path the training took, on
the clipping itself, and on the seed. So a constant is offered as provisional, with an interval
learnt from runs repeated with another seed; where the norms drift a policy is named instead, and
where the band would do harm that is said.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigurationError
from gradwatch_monitor.evidence import Evidence
from gradwatch_monitor.history import History
from gradwatch_monitor.verdicts import Verdict, judge, over, remarks, unknown

if TYPE_CHECKING:
    from gradwatch.policies import Policy
    from gradwatch_monitor.store import Store

__all__ = ["History", "Recommendation", "Verdict", "recommend", "recommend_from"]


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do about a run's clipping threshold, and why.

    `threshold` is the constant that should clip `target` of the steps, whatever the verdict (None
    where too few norms are known to tell one). `interval` holds the clip ratio that a re-run with it should
    have, in 80 % of cases. `policy` is what to run with: None where nothing is to be changed.
    """

    verdict: Verdict
    threshold: float | None
    predicted_clip_ratio: float | None
    interval: tuple[float, float] | None
    policy: Policy[Any] | None
    reasons: tuple[str, ...]
    steps: int
    current_threshold: float | None  # the last one in force
    current_clip_ratio: float | None
    target: float
    band: tuple[float, float]
    current_is_constant: bool = True  # whether it was in force all along
    current_policy: str = ""  # the class of what clips now
    over: str = ""  # the steps that `current_clip_ratio` is of, in words

    @property
    def sentence(self) -> str:
        """The recommendation in one sentence with its numbers."""
        if self.threshold is None or self.interval is None or self.predicted_clip_ratio is None:
            return self.reasons[0]
        low, high = (round(100 * bound) for bound in self.interval)
        would = (
            f"{self.threshold:g} would clip {100 * self.predicted_clip_ratio:.0f} % of the next run "
            f"({low}–{high} % in four cases of five)"
        )
        if self.current_clip_ratio is None:
            return would
        at = f" at {self.current_threshold:g}" if self.current_is_constant else ""
        return f"clipped {100 * self.current_clip_ratio:.0f} % of steps{at} {self.over}; {would}"

    @property
    def other_reasons(self) -> tuple[str, ...]:
        """The reasons that the sentence does not say already."""
        return tuple(reason for reason in self.reasons if reason != self.sentence)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        policy = self.policy.describe() if self.policy is not None else None
        return {**values, "policy": policy, "sentence": self.sentence}


def recommend(
    store: Store,
    run_id: int,
    target: float = 0.20,
    band: tuple[float, float] = (0.10, 0.30),
) -> Recommendation:
    """The recommendation for a run, from its visible timeline.

    Args:
        store: where the run is.
        run_id: its integer id (`store.run("name").id`).
        target: the share of steps the constant should clip, inside the band.
        band: the shares between which a threshold is left as it is.

    Raises:
        ConfigurationError: `target` and `band` are no such shares.
    """
    _check(target, band)
    return recommend_from(History.of(store, run_id), target=target, band=band)


def recommend_from(
    history: History, *, target: float = 0.20, band: tuple[float, float] = (0.10, 0.30)
) -> Recommendation:
    """The same from a history in memory: a pure function."""
    _check(target, band)
    seen = Evidence(history, target)
    if (untold := unknown(seen)) is not None:
        verdict, policy, reasons = untold
        return Recommendation(
            verdict, None, None, None, policy, tuple(reasons), history.steps,
            seen.current_threshold, seen.late_ratio, target, band, current_policy=history.policy,
            over=over(seen),
        )  # fmt: skip
    verdict, policy, reasons = judge(seen, band)
    return Recommendation(
        verdict=verdict,
        threshold=seen.tau,
        predicted_clip_ratio=seen.ratio(seen.tau),
        interval=seen.interval(),
        policy=policy,
        reasons=(*reasons, *remarks(seen, verdict)),
        steps=history.steps,
        current_threshold=seen.current_threshold,
        current_clip_ratio=seen.late_ratio,
        target=target,
        band=band,
        current_is_constant=seen.constant,
        current_policy=history.policy,
        over=over(seen),
    )


def _check(target: float, band: tuple[float, float]) -> None:
    low, high = band
    if not 0 < low < high < 1:
        msg = f"band={band!r}: two shares 0 < low < high < 1, as in (0.10, 0.30)"
        raise ConfigurationError(msg)
    if not low <= target <= high:
        msg = f"target={target!r}: a share inside the band {band!r}"
        raise ConfigurationError(msg)
