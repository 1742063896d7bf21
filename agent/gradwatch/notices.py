"""What is worth noting about a step: the events and layer samples it writes beside its record."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from gradwatch import events
from gradwatch.events import BadGradient
from gradwatch.listing import Listing, every
from gradwatch.norms import fault
from gradwatch.shards import Shards
from gradwatch.troubles import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.names import Named, ParameterNames
    from gradwatch.policies import Policy
    from gradwatch.records import Event, Measurement, Skip, ThresholdChange
    from gradwatch.treatment import OpenStep

__all__ = ["Notices"]

_SAMPLE_AT_LEAST = 100  # steps between two samples of the layer norms,
_SAMPLE_PER_TENSOR = 10  # or this many a tensor, so that a sample stays cheap to store
_NO_END = 50  # steps in a row with a gradient that is not finite
_EARLY = frozenset({100, 200})  # steps sampled in any case: what is wrong from the start shows


class Notices:
    """Turns what one step showed into events and layer samples. One a run, on its rank."""

    def __init__(self, names: ParameterNames, layer_norms_every: int | None) -> None:
        self.rank = 0
        self.alone = True  # no other rank has a part in these gradients
        # From the hooks' step numbers to the run's, waiting so many seconds; None: not known yet.
        self.origin: Callable[[float], int | None] = lambda _: 0
        self._parameters: list[str] = []  # what the optimizer's parameters are called
        self._listing = Listing()  # those parameters
        self.introduced: list[str] = []  # what the flight recorder's metadata calls them
        self._told_names: bytes | None = None  # where they differ: the names as a sample has them
        self._names = names
        self._asked_for = layer_norms_every
        self._seldom = _SAMPLE_AT_LEAST  # steps between two samples of the weights
        self.every = 0  # steps between two samples; 0 until the parameters are named
        self.bad_gradients = events.Repeats()
        # Of a run of several optimizers, what is known of the bad gradients of this one, by step.
        self.to_join: dict[int, BadGradient] | None = None
        self._bad_from = self._bad_until = -2  # the last steps in a row whose gradient was bad
        self._norm_spikes = events.NormSpikes()
        self._loss_spikes = events.LossSpikes()
        self._bad_losses = events.Repeats()
        self._overflows = events.Repeats()
        self._zeros = events.Repeats()

    def number(self, step: int, timeout: float = 0.0) -> int:
        """A step's number in the run, for who reads it; in this process where that is not known."""
        return step + (self.origin(timeout) or 0)

    def called(self, step: int, timeout: float = 0.0) -> str:
        """The step by its number, and of what that is the number where it is not the run's."""
        origin = self.origin(timeout)
        return f"step {step} of this process" if origin is None else f"step {step + origin}"

    def bad(
        self,
        step: OpenStep,
        optimizer: Optimizer | None,
        *,
        skipped: bool,
        modified: bool,
        weights: bool | None,
    ) -> BadGradient:
        """What is known of a gradient with NaN or inf. After an all-reduce nobody knows whose it was."""
        measured = step.measured
        grads = [g for m in measured for g in m.grads]  # none where the step is over
        norms = [n for m in measured for n in m.tensor_norms]
        named = step.named
        if named is None:
            named = self._names.named([p for m in measured for p in m.params], optimizer)
        spoilt = [i for i in named.order if not math.isfinite(norms[i])]
        faults = {}
        for i in spoilt:
            # Where another rank holds it, or nobody any more, its norm alone tells.
            seen = fault(grads[i]) if grads else None
            faults[named.names[i]] = seen or ("nan" if math.isnan(norms[i]) else "inf")
        ranks = [self.rank] if self.alone else []
        shards = Shards.of(grads)
        if shards is not None:
            ranks = shards.ranks_with(any(fault(g) is not None for g in grads))
        return BadGradient(
            faults, [named.places[i] for i in spoilt], len(norms), ranks,
            skipped=skipped, modified=modified, weights=weights, complete=named.complete,
        )  # fmt: skip

    def gradient(
        self, step: int, time: float, norm: float, measured: Sequence[Measurement]
    ) -> Event | None:
        """What a finite gradient norm shows: a spike, or that it is 0."""
        if self.to_join is not None:
            return None
        if norm == 0.0:
            return self.zero(step, time, sum(len(m.params) for m in measured))
        return self.spike(step, time, norm)

    def zero(self, step: int, time: float, tensors: int) -> Event | None:
        """A gradient that is exactly 0, of so many tensors."""
        if not self._zeros.told(step):
            return None
        return events.dead_gradient(step, time, self.rank, tensors, self._zeros)

    def spike(self, step: int, time: float, norm: float) -> Event | None:
        """A norm that stands out, if this one does."""
        median = self._norm_spikes.observe(norm)
        if median is None:
            return None
        return events.grad_norm_spike(step, time, self.rank, norm, median)

    def loss(self, step: int, time: float, loss: float) -> Event | None:
        """What a loss shows: NaN or inf, or a spike."""
        if not math.isfinite(loss):
            if not self._bad_losses.told(step):
                return None
            return self._of_rank(
                events.nonfinite_loss(step, time, self.rank, loss, self._bad_losses)
            )
        spike = self._loss_spikes.observe(loss)
        if spike is None:
            return None
        return events.loss_spike(step, time, self.rank, loss, *spike)

    def nonfinite(self, step: int, time: float, bad: BadGradient) -> Event:
        """A gradient with NaN or inf."""
        return self._of_rank(events.nonfinite_gradient(step, time, bad, self.bad_gradients))

    def warn(self, step: int, message: str, *, skipped: bool) -> None:
        """In the job's own log: the first gradient with NaN or inf, and when there is no end to them."""
        if self._bad_until < 0:
            called = self.called(step)
            logger.warning("gradwatch: %s: %s; further ones are on record", called, message)
        if step != self._bad_until + 1:
            self._bad_from = step
        self._bad_until = step
        if step - self._bad_from + 1 == _NO_END:
            outcome = "all skipped, nothing is learnt" if skipped else "applied"
            logger.warning(
                "gradwatch: %d steps in a row with NaN or inf in the gradient, %s: steps %d to %d",
                _NO_END, outcome, self.number(self._bad_from), self.number(step),
            )  # fmt: skip

    def weights(
        self, step: int, time: float, norms: Sequence[float], optimizer: Optimizer
    ) -> Event | None:
        """Weights that are NaN or inf, by the norms of all that the optimizer lists."""
        named = self._names.named(every(optimizer), optimizer)
        bad = [named.names[i] for i in named.order if not math.isfinite(norms[i])]
        return events.nonfinite_weights(step, time, self.rank, bad, len(norms)) if bad else None

    def _of_rank(self, event: Event) -> Event:
        """Whose it was in the words as well, where there are others."""
        if self.alone or event.rank is None:
            return event
        return dataclasses.replace(event, message=f"rank {event.rank}: {event.message}")

    def overflow(self, step: int, time: float, loss_scale: float) -> Event | None:
        """A step that the loss scaler suppressed."""
        if not self._overflows.told(step):
            return None
        return events.amp_overflow(step, time, self.rank, loss_scale, self._overflows)

    def skipped(self, step: int, time: float, skip: Skip) -> Event:
        """A step that the policy chose not to apply."""
        return events.spike_skipped(step, time, self.rank, skip)

    def changed(
        self,
        step: int,
        time: float,
        change: ThresholdChange,
        before: tuple[Policy[Any], float],
        after: tuple[Policy[Any], float],
    ) -> Event:
        """Another threshold or policy was applied to the running job."""
        return events.threshold_changed(step, time, self.rank, change, before, after)

    def due(self, step: int) -> bool:
        """Whether this step's layer norms are sampled."""
        every = self.every
        return bool(every) and (not step % every or (step in _EARLY and self._asked_for is None))

    def samples(self, step: int) -> tuple[bool, bool]:
        """Whether this step's layer norms are sampled, and whether with the weights' norms.

        Those change slowly and take a read of their own, so they come with fewer samples.
        """
        if not self.due(step):
            return False, False
        every, seldom = self.every, self._seldom
        return True, every >= seldom or step % seldom < every or step in _EARLY

    def introduce(self, optimizer: Optimizer) -> list[str]:
        """The names of all parameters for a flight recorder that begins, in the optimizer's order."""
        self.introduced = self.listed(optimizer)
        self._told_names = None
        return self.introduced

    def listed(self, optimizer: Optimizer) -> list[str]:
        """The names of all parameters that the optimizer lists now, in its order."""
        params = every(optimizer)
        if self._listing.changed(params):
            self._parameters = self._names.of(params, optimizer)
            same = self._parameters == self.introduced
            self._told_names = None if same else events.encode_names(self._parameters)
            self._seldom = max(_SAMPLE_AT_LEAST, _SAMPLE_PER_TENSOR * len(params))
            self.every = self._seldom if self._asked_for is None else self._asked_for
        return self._parameters

    def named(self, params: Sequence[Tensor], optimizer: Optimizer) -> Named:
        """What these parameters are called, for a step that is put on record later."""
        return self._names.named(params, optimizer)

    def layers(
        self, step: OpenStep, optimizer: Optimizer, weights: Sequence[float] | None
    ) -> bytes:
        """A sample of every parameter's gradient norm, and of the weights' where they are given.

        By the names that the parameters had at that step.
        """
        listed = self.listed(optimizer)
        told = self._told_names
        if step.listed is not None and step.listed is not listed:  # the list has changed since
            listed, told = step.listed, events.encode_names(step.listed)
        measured = step.measured
        # Of a policy a group, each group's norms one after another.
        norms = [norm for one in measured for norm in one.tensor_norms]
        if step.named is not None:
            names = step.named.names
        elif len(measured) == 1 and self._listing.holds(measured[0].params):
            names = listed
        else:
            names = self._names.of([p for m in measured for p in m.params], optimizer)
        if names != listed:  # in another order, or some have no gradient
            found = dict(zip(names, norms, strict=True))
            norms = [found.get(name, math.nan) for name in listed]
        if weights is not None and len(weights) != len(norms):
            weights = None
        return events.encode_layers(step.number, norms, weights, told)
