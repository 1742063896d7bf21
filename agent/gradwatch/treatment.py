"""Measuring, deciding and carrying out, for one step of one optimizer.

Hot: what is rare is kept out of line.
"""

from __future__ import annotations

import math
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from gradwatch.afterwards import Afterwards
from gradwatch.control import replaced
from gradwatch.errors import NonFiniteGradientError
from gradwatch.events import encode_event
from gradwatch.listing import Listing, every
from gradwatch.norms import combine, tensor_norms
from gradwatch.part import Part
from gradwatch.policies import SkipSpikes
from gradwatch.recorder import FLAGS
from gradwatch.records import Scale, Skip
from gradwatch.scaling import CLIP_EPSILON, DIVISOR_LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.names import Named
    from gradwatch.notices import Notices
    from gradwatch.records import Event, Measurement, ThresholdChange
    from gradwatch.scaling import Carrier

__all__ = ["OnNonFinite", "OpenStep", "Treatment"]

OnNonFinite = Literal["skip", "raise", "ignore"]
_nan = math.nan
_SAY_SECONDS = 1.0  # how long an error waits to be told the step's number in the run
# The exporter counts these by the record, without reading the events.
_FLAG_OF_EVENT = {"grad_norm_spike": FLAGS.NORM_SPIKE}


class OpenStep:
    """A step between the first look at it and its record. What a step does not set stays as here."""

    pre_norm = post_norm = loss_scale = _nan
    flags = 0
    messages: Sequence[bytes] = ()
    loss: Tensor | float | None = None
    known_loss: float | None = None  # of a deferred step, once it is here
    lr: Any = _nan
    ended = _nan  # by the monotonic clock
    deferred = False  # it was decided on the device
    recorded = False
    error: NonFiniteGradientError | None = None  # to raise once recorded
    by_hand: tuple[Tensor, int] | None = None  # a gradient clip() saw, and its version
    # Of a deferred step: what those measured were called, and all that the optimizer listed.
    named: Named | None = None
    listed: list[str] | None = None
    weights: Sequence[float] | None = None  # the weights' norms before the step, where looked at
    warning: str | None = None  # for the job's log, once it is known that it is no overflow

    def __init__(self, number: int, time: float, threshold: float) -> None:
        self.number = number
        self.time = time
        self.threshold = threshold
        self.measured: Sequence[Measurement] = ()  # one a part


class Treatment:
    """What is done to a gradient, by the policies of its parts."""

    def __init__(
        self,
        parts: list[Part],
        carrier: Carrier,
        notices: Notices,
        *,
        on_nonfinite: OnNonFinite,
    ) -> None:
        self.parts = parts
        self.notices = notices
        self.on_nonfinite = on_nonfinite
        self._carrier = carrier
        self._only = parts[0] if len(parts) == 1 else None
        self.by_group = parts[0].group is not None
        self._listing = Listing()  # of all parts together
        self.afterwards = Afterwards()
        self._weights_told = False  # since they were finite last
        self.look_at_policies()

    def look_at_policies(self) -> None:
        """Note what the policies ask for; again whenever one has been replaced."""
        self._wants_loss = any(part.policy.wants_loss for part in self.parts)
        self._learns = any(part.policy.learns for part in self.parts)
        skipping = any(isinstance(part.policy, SkipSpikes) for part in self.parts)
        self.may_skip = skipping or self.on_nonfinite == "skip"

    def look_anew(self) -> None:
        """Note what the loop does as if for the first time: it may be another loop."""
        self.afterwards.forget()
        self.afterwards = Afterwards()

    @property
    def threshold(self) -> float:
        """The threshold in force, NaN where there is no single one."""
        only = self._only
        threshold = None if only is None else only.policy.threshold(only.state)
        return _nan if threshold is None else threshold

    def new_groups(self, optimizer: Optimizer) -> Part | None:
        """Take in groups that were added since the wrap, each under the last policy; its part."""
        if not self.by_group or len(optimizer.param_groups) <= len(self.parts):
            return None
        for group in range(len(self.parts), len(optimizer.param_groups)):
            self.parts.append(Part(self.parts[-1].policy, group))
        self._only = None
        return self.parts[-1]

    def change(self, step: int, time: float, change: ThresholdChange) -> Event:
        """Clip as was asked for from this step on, before anything is done to it."""
        (part,) = self.parts
        before, threshold = part.policy, self.threshold
        part.take(replaced(before, change))
        self.look_at_policies()
        return self.notices.changed(
            step, time, change, (before, threshold), (part.policy, self.threshold)
        )

    def look(
        self, optimizer: Optimizer, step: OpenStep, scale: float, loss: Tensor | float | None
    ) -> None:
        """Measure every part; `pre_norm` is the norm of all together."""
        if self._only is not None:
            measured = self._only.measure(optimizer, scale)
            step.measured = (measured,)
            step.pre_norm = measured.norm
        else:
            step.measured = self._measure_parts(optimizer, scale)
            norms = [measured.norm for measured in step.measured]
            step.pre_norm = combine(norms, step.measured[0].norm_type)
        if self._wants_loss and loss is not None:
            known = float(loss)
            step.measured = [measured._replace(loss=known) for measured in step.measured]
        grads = step.measured[0].grads
        if grads:
            self.note_changes(step, grads)
        elif not any(measured.grads for measured in step.measured):
            # Without a gradient there is no norm. A norm of 0 is that of a gradient that is 0.
            step.pre_norm = _nan
            step.flags |= FLAGS.NO_GRADIENT

    def _measure_parts(self, optimizer: Optimizer, scale: float) -> list[Measurement]:
        """One measurement a part; what several groups list belongs to the first of them."""
        found = [part.gradients(optimizer) for part in self.parts]
        listing = self._listing
        listing.changed([param for params, _ in found for param in params])
        if listing.first is not None:
            kept, start = set(listing.first), 0
            for i, (params, grads) in enumerate(found):
                mine = [k for k in range(len(params)) if start + k in kept]
                start += len(params)
                found[i] = [params[k] for k in mine], [grads[k] for k in mine]
        return [
            part.measure_these(params, grads, scale)
            for part, (params, grads) in zip(self.parts, found)  # noqa: B905 - made as long
        ]

    def note_changes(self, step: OpenStep, grads: Sequence[Tensor]) -> None:
        """Note gradients changed in place: these, since the backward pass; the last, since its step."""
        step.flags |= self.afterwards.since(grads)
        try:
            if grads[0]._version > 0 and grads[-1]._version > 0:
                step.flags |= FLAGS.MODIFIED
        except RuntimeError:  # made in inference mode: nobody counts
            pass

    def act(self, optimizer: Optimizer, step: OpenStep, *, by_hand: bool) -> None:
        """Decide and carry out, or deal with a non-finite gradient; note what is worth noting.

        Of a step without any gradient there is nothing to decide, and nothing to learn.
        """
        notices = self.notices
        if isfinite(step.pre_norm):
            event = notices.gradient(step.number, step.time, step.pre_norm, step.measured)
            if self._only is not None:
                self._clip(optimizer, step, self._only, by_hand=by_hand)
            else:
                self._clip_parts(optimizer, step, by_hand=by_hand)
        elif step.flags & FLAGS.NO_GRADIENT:
            event = None
        else:
            event = self._nonfinite(optimizer, step, by_hand=by_hand)
            if step.flags & FLAGS.SKIPPED and not by_hand:
                self.skip(step)
        if event is not None:
            step.messages = [*step.messages, encode_event(event)]
            step.flags |= _FLAG_OF_EVENT.get(event.kind, 0)
        if event is not None or notices.due(step.number):
            self._sample(optimizer, step, always_weights=event is not None)

    def complete(self, optimizer: Optimizer | None, step: OpenStep) -> bool:
        """The same for a step that was decided, and is over: whether there is an event."""
        (measured,) = step.measured
        step.pre_norm = measured.norm
        if isfinite(measured.norm):
            event = self.notices.gradient(step.number, step.time, measured.norm, step.measured)
            coefficient = step.threshold / (measured.norm + CLIP_EPSILON)
            if coefficient < 1.0:
                step.flags |= FLAGS.CLIPPED
                step.post_norm = measured.norm * max(coefficient, measured.scale / DIVISOR_LIMIT)
            else:
                step.post_norm = measured.norm
        else:
            event = self._nonfinite(optimizer, step)
        if event is not None:
            step.messages = [*step.messages, encode_event(event)]
            step.flags |= _FLAG_OF_EVENT.get(event.kind, 0)
        return event is not None

    def _sample(self, optimizer: Optimizer, step: OpenStep, *, always_weights: bool) -> None:
        _, weights = self.notices.samples(step.number)
        if step.flags & FLAGS.NO_GRADIENT and not weights:
            return
        held = None
        if step.weights is not None:
            held = step.weights
        elif weights or always_weights:
            held = tensor_norms([param.detach() for param in every(optimizer)])
        self.sample(optimizer, step, held)

    def sample(
        self, optimizer: Optimizer | None, step: OpenStep, weights: Sequence[float] | None
    ) -> None:
        """Put the layer norms on record; of an optimizer that is gone, nothing."""
        if optimizer is None:
            return
        layers = self.notices.layers(step, optimizer, weights)
        step.messages = [*step.messages, layers]

    def _clip(self, optimizer: Optimizer, step: OpenStep, part: Part, *, by_hand: bool) -> None:
        """One policy over everything, which the optimizer's kernel may carry out."""
        measured = step.measured[0]
        decision = part.policy.decide(measured, part.state)
        if type(decision) is Scale:  # a threshold that takes the norm itself into account
            step.threshold = decision.max_norm
        elif isinstance(decision, Skip):
            self._skip_spike(step, decision, by_hand=by_hand)
            return
        clipped, step.post_norm = self._carrier.carry_out(
            optimizer, decision, measured, fold=not (by_hand or part.repeats)
        )
        if clipped:
            step.flags |= FLAGS.CLIPPED

    def _clip_parts(self, optimizer: Optimizer, step: OpenStep, *, by_hand: bool) -> None:
        """A policy a part, each in place; one that skips skips the step."""
        decisions = [
            part.policy.decide(measured, part.state)
            for part, measured in zip(self.parts, step.measured)  # noqa: B905 - made as long
        ]
        for decision in decisions:
            if isinstance(decision, Skip):
                self._skip_spike(step, decision, by_hand=by_hand)
                return
        norms = []
        for decision, measured in zip(decisions, step.measured):  # noqa: B905
            clipped, norm = self._carrier.carry_out(optimizer, decision, measured, fold=False)
            norms.append(norm)
            if clipped:
                step.flags |= FLAGS.CLIPPED
        step.post_norm = combine(norms, measured.norm_type)

    def _skip_spike(self, step: OpenStep, decision: Skip, *, by_hand: bool) -> None:
        step.flags |= FLAGS.SKIPPED
        event = self.notices.skipped(step.number, step.time, decision)
        step.messages = [*step.messages, encode_event(event)]
        if not by_hand:
            self.skip(step)

    def _nonfinite(
        self, optimizer: Optimizer | None, step: OpenStep, *, by_hand: bool = False
    ) -> Event | None:
        """Note it; the event, where this step is told."""
        skipped = self.on_nonfinite != "ignore"
        step.flags |= FLAGS.NONFINITE
        if skipped:
            step.flags |= FLAGS.SKIPPED
        notices = self.notices
        if not notices.bad_gradients.told(step.number) and self.on_nonfinite != "raise":
            self._warn_of(step, "", by_hand=by_hand)
            return None
        bad = notices.bad(
            step,
            optimizer,
            skipped=skipped,
            modified=self._is_modified(step),
            weights=self._weights_are_bad(optimizer, step),
        )
        event = notices.nonfinite(step.number, step.time, bad)
        if self.on_nonfinite == "raise":
            called = notices.called(step.number, _SAY_SECONDS)
            number = notices.number(step.number)
            step.error = NonFiniteGradientError(
                f"{called}: {event.message}", step=number, parameters=dict(bad.faults)
            )
        else:
            self._warn_of(step, event.message, by_hand=by_hand)
        if notices.to_join is not None:
            notices.to_join[step.number] = bad
            return None
        return event

    def _weights_are_bad(self, optimizer: Optimizer | None, step: OpenStep) -> bool | None:
        """Whether weights were NaN or inf before this step; None where that is not known."""
        # A deferred step is over: where NaN is applied, the weights have it from this step.
        if optimizer is None or (step.deferred and self.on_nonfinite != "skip"):
            return None
        step.weights = tensor_norms([param.detach() for param in every(optimizer)])
        event = self.notices.weights(step.number, step.time, step.weights, optimizer)
        if event is not None and not self._weights_told:
            step.messages = [*step.messages, encode_event(event)]
        self._weights_told = event is not None
        return event is not None

    @staticmethod
    def _is_modified(step: OpenStep) -> bool:
        """Whether a gradient that is not finite was written to after autograd had made it."""
        try:
            return bool(step.flags & FLAGS.MODIFIED) or any(
                grad._version > 0
                for measured in step.measured
                for grad, norm in zip(measured.grads, measured.tensor_norms)  # noqa: B905 - none where deferred
                if not isfinite(norm)
            )
        except RuntimeError:  # made in inference mode: nobody counts
            return True

    def _warn_of(self, step: OpenStep, message: str, *, by_hand: bool) -> None:
        """Say it in the job's log, once it is known that it is no overflow under a GradScaler."""
        if self.notices.rank == 0 and self.notices.to_join is None:
            step.warning = message
            if not by_hand:
                self.warn(step)

    def warn(self, step: OpenStep) -> None:
        """Say in the job's log what `clip()` has seen of this step."""
        if step.warning is not None:
            self.notices.warn(step.number, step.warning, skipped=self.on_nonfinite == "skip")
            step.warning = None

    def skip(self, step: OpenStep) -> None:
        """Hide what was measured, so that the step is not applied."""
        for measured in step.measured:
            self._carrier.skip(measured.params, measured.grads)

    def overflow(self, step: OpenStep) -> None:
        """Routine under a GradScaler: not a non-finite gradient, and no alert."""
        step.pre_norm = step.post_norm = _nan
        step.flags = FLAGS.SKIPPED | FLAGS.AMP_OVERFLOW
        step.warning = None
        self.notices.bad_gradients.take_back(step.number)
        event = self.notices.overflow(step.number, step.time, step.loss_scale)
        step.messages = [] if event is None else [encode_event(event)]

    def learn(self, step: OpenStep, loss: float | None) -> None:
        """After the step: what the policies take in of it."""
        if self._learns and isfinite(step.pre_norm):
            for part, measured in zip(self.parts, step.measured, strict=True):
                part.state = part.policy.update(part.state, measured.norm, loss)

    def look_again(self, optimizer: Optimizer, step: OpenStep | None) -> None:
        """A further gradient of the same step (LBFGS): clipped in place, and noted where it is bad."""
        if self._only is not None:
            measured = [self._only.measure(optimizer, 1.0)]
        else:
            measured = self._measure_parts(optimizer, 1.0)
        if all(m.finite for m in measured):
            for part, m in zip(self.parts, measured, strict=True):
                decision = part.policy.decide(m, part.state)
                self._carrier.carry_out(optimizer, decision, m, fold=False)
        elif step is not None and not step.flags & FLAGS.NONFINITE:
            step.measured = measured
            step.pre_norm = combine([m.norm for m in measured], measured[0].norm_type)
            step.post_norm = _nan
            # The record is of this evaluation now, and no longer of the first.
            step.flags &= ~(FLAGS.CLIPPED | FLAGS.NO_GRADIENT)
            if (event := self._nonfinite(optimizer, step)) is not None:
                step.messages = [*step.messages, encode_event(event)]
            if step.flags & FLAGS.SKIPPED:
                self.skip(step)
