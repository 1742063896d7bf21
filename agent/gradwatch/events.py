"""What happens at a step, as events: non-finite values, spikes, dead gradients, overflows."""

from __future__ import annotations

import itertools
import json
import math
import struct
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch.cells import document, lenient_json, real, whole
from gradwatch.records import Event, LayerNorms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.policies import Policy
    from gradwatch.records import Skip, ThresholdChange

__all__ = [
    "BadGradient",
    "LossSpikes",
    "NormSpikes",
    "Repeats",
    "amp_overflow",
    "dead_gradient",
    "decode",
    "encode_event",
    "encode_layers",
    "encode_names",
    "grad_norm_spike",
    "layers_of",
    "loss_spike",
    "nonfinite_gradient",
    "nonfinite_loss",
    "nonfinite_weights",
    "spike_skipped",
    "threshold_changed",
]

_NAMED = 3  # parameters spelled out in a message; all of them are in the data
_MOST_NAMED = 4000  # parameters of one event, so that it fits the flight recorder
_LAYERS = struct.Struct("<BBIq")  # tag, whether weight norms follow, how many, step
_LAYERS_TAG = 1  # no JSON begins with it, nor with
_NAMED_LAYERS_TAG = 2  # names as JSON follow the norms
_QUARTILES = 1.349  # standard deviations between the quartiles of a normal distribution


class NormSpikes:
    """Finds norms above 5 times the median of the 50 norms before them, and out of scale.

    The latter: above it by more than 4 standard deviations of their logarithms, as the quartiles of
    the differences from step to step tell them, whatever the trend. Norms that flicker from batch
    to batch, as those of small batches do once a run has learnt, would spike all the time otherwise
    (docs/decisions.md).

    From 20 norms on, all of them finite and above 0. A spike enters the window as one norm among 50,
    which median and quartiles do not notice. One that follows another within 5 steps belongs to the
    same burst and is not told again. Never reset.
    """

    FACTOR = 5.0
    DEVIATIONS = 4.0
    WINDOW = 50
    FROM = 20
    BURST = 5
    RENEWAL = 10

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._since = self.BURST  # norms since the last one that was above
        self._unsuspicious = 0.0  # no norm up to here is a spike,
        self._holds_for = 0  # for so many norms

    def observe(self, norm: float) -> float | None:
        """The median before this finite norm, where a spike begins with it; else None."""
        self._since += 1
        self._holds_for -= 1
        if self._holds_for >= 0 and norm <= self._unsuspicious:
            self._recent.append(norm)
            return None
        median = self._median()
        above = norm > self.FACTOR * median and self._is_out_of_scale(norm, median)
        self._recent.append(norm)
        if not above:
            return None
        quiet, self._since = self._since, 0
        return median if quiet > self.BURST else None

    def _median(self) -> float:
        ordered = sorted(self._recent)
        middle = len(ordered) // 2
        if len(ordered) < self.FROM:
            return math.inf
        # A norm that comes, and one that goes, move the median by one place at most.
        self._unsuspicious = self.FACTOR * ordered[middle - self.RENEWAL]
        self._holds_for = self.RENEWAL
        return ordered[middle]

    def _is_out_of_scale(self, norm: float, median: float) -> bool:
        logarithms = [math.log(known) for known in self._recent]
        steps = sorted(after - before for before, after in itertools.pairwise(logarithms))
        quarter = len(steps) // 4
        deviation = (steps[-1 - quarter] - steps[quarter]) / (_QUARTILES * math.sqrt(2.0))
        return math.log(norm) - math.log(median) > self.DEVIATIONS * deviation


class LossSpikes:
    """Finds losses above mean + 6 standard deviations of the 128 finite losses before them.

    From 64 losses on (the rule of OLMo-core's SkipStepOptimizer). Sums are taken relative to the
    first loss of the window and made anew every 128 losses, so rounding does not pile up.
    """

    SIGMAS = 6.0
    WINDOW = 128
    FROM = 64

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._origin = self._sum = self._squares = 0.0
        self._until_renewal = self.WINDOW

    def observe(self, loss: float) -> tuple[float, float] | None:
        """Mean and standard deviation before this finite loss, where it spikes; else None."""
        count = len(self._recent)
        found = None
        if count >= self.FROM:
            mean = self._sum / count
            deviation = math.sqrt(max(0.0, self._squares / count - mean * mean))
            if deviation > 0.0 and loss - self._origin > mean + self.SIGMAS * deviation:
                found = (mean + self._origin, deviation)
        self._add(loss)
        return found

    def _add(self, loss: float) -> None:
        recent = self._recent
        recent.append(loss)
        if len(recent) > self.WINDOW:
            self._shift(recent.popleft(), -1)
        self._until_renewal -= 1
        if self._until_renewal <= 0 or len(recent) == 1:
            self._until_renewal = self.WINDOW
            self._origin = recent[0]
            self._sum = self._squares = 0.0
            for value in recent:
                self._shift(value, 1)
        else:
            self._shift(loss, 1)

    def _shift(self, value: float, sign: int) -> None:
        offset = value - self._origin
        self._sum += sign * offset
        self._squares += sign * offset * offset


class BadGradient(NamedTuple):
    """What is known of a gradient that held NaN or inf.

    `faults`: parameter → nan | inf | nan+inf, in model order; `places` are theirs in the model.
    `ranks` are those whose part of the gradient shows it, where that is known. `weights`: whether
    weights were not finite before the step, None where they could not be looked at. `complete`:
    whether no parameter of the model comes after those that were measured.
    """

    faults: Mapping[str, str]
    places: Sequence[float]
    tensors: int
    ranks: Sequence[int]
    skipped: bool
    modified: bool
    weights: bool | None
    complete: bool
    whose: str = ""  # which of several optimizers have such gradients, as a part of a sentence

    @classmethod
    def joined(cls, parts: Sequence[BadGradient], finite: int, optimizers: int) -> BadGradient:
        """Of these of so many optimizers of one model; the others have as many finite tensors."""
        faults = [item for part in parts for item in part.faults.items()]
        places = [place for part in parts for place in part.places]
        order = sorted(range(len(faults)), key=places.__getitem__)
        known = [part.weights for part in parts]
        return cls(
            dict(faults[i] for i in order),
            [places[i] for i in order],
            sum(part.tensors for part in parts) + finite,
            sorted({rank for part in parts for rank in part.ranks}),
            all(part.skipped for part in parts),
            any(part.modified for part in parts),
            True if True in known else None if None in known else False,
            any(part.complete for part in parts),
            f"of {len(parts)} of {optimizers} optimizers " if len(parts) < optimizers else "",
        )


def nonfinite_gradient(
    step: int, time: float, bad: BadGradient, repeats: Repeats | None = None
) -> Event:
    """The gradient held NaN or inf.

    Gradients flow backwards: what is non-finite at one layer makes the layers before it
    non-finite and leaves those after it finite. So it entered at the last non-finite parameter;
    where all are non-finite, it came from the forward pass, the loss, or a later layer that was not
    measured. Neither can be told of gradients that were modified in place, and of weights that were
    not finite before. `repeats` has counted this step and those before it.
    """
    names = list(bad.faults)
    kinds = {kind for fault in bad.faults.values() for kind in fault.split("+")}
    what = " and ".join(k for k in ("NaN", "inf") if k.lower() in kinds)
    entered, origin, why = _cause(bad, names)
    if len(names) == bad.tensors:
        where = (
            f"all {bad.tensors} parameters ({names[0]} … {names[-1]})" if names[1:] else names[0]
        )
    else:
        listed = ", ".join(names[:_NAMED]) + (
            f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        )
        where = f"{len(names)} of {bad.tensors} parameters ({listed})"
    outcome = f"the step {bad.whose}was{'' if bad.skipped else ' not'} skipped"
    if repeats is not None:
        outcome += repeats.said("the gradient was not finite")
    return Event(
        "nonfinite_gradient",
        step,
        time,
        "critical",
        f"{what} in the gradient of {where}; {why}; {outcome}",
        {
            "parameters": dict(bad.faults),
            "origin": origin,
            "entered": entered,
            "tensors": bad.tensors,
            "skipped": bad.skipped,
            "ranks": list(bad.ranks),
            **(repeats.data if repeats is not None else {}),
        },
        bad.ranks[0] if len(bad.ranks) == 1 else None,
    )


def _cause(bad: BadGradient, names: Sequence[str]) -> tuple[str, str | None, str]:
    """Where NaN or inf entered, as a word and by its parameter if it is known, and in words."""
    every = len(names) == bad.tensors
    whence = "the forward pass or the loss"
    if not bad.complete:
        whence = "the forward pass, the loss or a later layer that is not trained here"
    if bad.weights:
        return "weights", None, "weights were NaN or inf before the forward pass"
    # A single bad gradient is where it entered, whatever came before.
    if not every and (not bad.modified or len(names) == 1):
        entered = "unknown" if bad.modified else "backward"
        return entered, names[-1], f"it entered at {names[-1]}"
    if bad.modified:
        return "unknown", None, (
            "where it entered is not known: gradients were written to after they were made (added up "
            "over several backward passes, or changed in place before step())"
        )  # fmt: skip
    entered = "forward" if bad.complete else "outside"
    return entered, None, f"it came from {'the weights, ' if bad.weights is None else ''}{whence}"


def nonfinite_weights(step: int, time: float, rank: int, bad: Sequence[str], tensors: int) -> Event:
    """Weights were NaN or inf before this step's update. `bad`: their parameters, in model order."""
    return Event(
        "nonfinite_weights",
        step,
        time,
        "critical",
        f"NaN or inf in the weights of {len(bad)} of {tensors} parameters, the first {bad[0]}, before "
        "this step's update: an earlier update, a checkpoint or the loop made them so",
        {
            "parameter": bad[0],
            "parameters": dict.fromkeys(bad, "nan or inf"),
            "tensors": tensors,
        },
        rank,
    )


class Repeats:
    """How often a fault has come: the 1st, 2nd, 4th, 8th … time is told.

    However often it comes, it costs the store a few events. After 100 steps without it, counting
    begins anew.
    """

    APART = 100

    def __init__(self) -> None:
        self.count = 0
        self.within = 0  # steps, from the first that was counted to the last
        self._last = self._before = -math.inf  # the last step with the fault, and the one before

    def told(self, step: int) -> bool:
        """Count this step, which has the fault, and say whether to tell it."""
        if step > self._last:
            apart = step - self._last
            if apart > self.APART:
                self.count = self.within = 0
            self.count += 1
            self.within = self.within + int(apart) if self.within else 1
            self._before, self._last = self._last, step
        return self.count & (self.count - 1) == 0

    def take_back(self, step: int) -> None:
        """If this step was counted: it had no such fault."""
        if step == self._last:
            self.count -= 1
            self.within = self.within - int(step - self._before) if self.count else 0
            self._last = self._before

    def said(self, what: str) -> str:
        """What came how often, as the end of a message; empty the first time."""
        if self.count <= 1:
            return ""
        of = f"{self.count:,} of" if self.count < self.within else "each of"
        return f"; {what} in {of} the last {self.within:,} steps"

    @property
    def data(self) -> dict[str, int]:
        """How often, for an event's data."""
        return {"count": self.count, "within": self.within}


def nonfinite_loss(
    step: int, time: float, rank: int, loss: float, repeats: Repeats | None = None
) -> Event:
    """The loss handed to `agent.log` (or returned by the closure) was NaN or inf."""
    message = f"the loss is {'NaN' if math.isnan(loss) else '-inf' if loss < 0 else 'inf'}"
    data: dict[str, Any] = {"value": "nan" if math.isnan(loss) else "inf"}
    if repeats is not None:
        message += repeats.said("it was not finite")
        data |= repeats.data
    return Event("nonfinite_loss", step, time, "critical", message, data, rank)


def grad_norm_spike(step: int, time: float, rank: int, norm: float, median: float) -> Event:
    """The pre-clip norm stood out from those before it (see `NormSpikes`)."""
    message = (
        f"gradient norm {norm:.4g} is {norm / median:.3g} times the median {median:.4g} "
        f"of the last {NormSpikes.WINDOW} steps"
    )
    data = {"norm": norm, "median": median}
    return Event("grad_norm_spike", step, time, "warning", message, data, rank)


def loss_spike(
    step: int, time: float, rank: int, loss: float, mean: float, deviation: float
) -> Event:
    """The loss stood out from those before it (see `LossSpikes`)."""
    message = (
        f"loss {loss:.4g} is {(loss - mean) / deviation:.3g} standard deviations above the mean "
        f"{mean:.4g} of the last {LossSpikes.WINDOW} steps"
    )
    data = {"loss": loss, "mean": mean, "standard_deviation": deviation}
    return Event("loss_spike", step, time, "warning", message, data, rank)


def amp_overflow(
    step: int, time: float, rank: int, loss_scale: float, repeats: Repeats | None = None
) -> Event:
    """The gradient overflowed under a GradScaler: routine, the scaler skips and backs off."""
    known = math.isfinite(loss_scale)
    shown = f" at loss scale {loss_scale:g}" if known else ""
    message = f"the gradient overflowed{shown}; the loss scaler skipped the step"
    data: dict[str, Any] = {"loss_scale": loss_scale if known else None}
    if repeats is not None:
        message += repeats.said("it overflowed")
        data |= repeats.data
    return Event("amp_overflow", step, time, "info", message, data, rank)


def dead_gradient(step: int, time: float, rank: int, tensors: int, repeats: Repeats) -> Event:
    """Every gradient was exactly 0."""
    why = f"every gradient is exactly 0{repeats.said('it was so')}"
    data = {"tensors": tensors, **repeats.data}
    return Event("dead_gradient", step, time, "warning", why, data, rank)


def spike_skipped(step: int, time: float, rank: int, skip: Skip) -> Event:
    """A policy chose not to apply the step."""
    return Event("spike_skipped", step, time, "warning", skip.reason, dict(skip.data), rank)


def threshold_changed(
    step: int,
    time: float,
    rank: int,
    change: ThresholdChange,
    before: tuple[Policy[Any], float],
    after: tuple[Policy[Any], float],
) -> Event:
    """From this step on another policy clips; `before` and `after` with their thresholds."""
    why = f": {change.reason}" if change.reason else ""
    shown = [
        "none" if math.isnan(threshold) else f"{threshold:.6g}" for _, threshold in (before, after)
    ]
    return Event(
        "threshold_changed",
        step,
        time,
        "info",
        f"the threshold went from {shown[0]} to {shown[1]} ({before[0]} → {after[0]}), asked for by "
        f"{change.requested_by}{why}",
        {
            "change": change.id,
            "from": None if math.isnan(before[1]) else before[1],
            "to": None if math.isnan(after[1]) else after[1],
            "clip": str(after[0]),
            "policy": after[0].describe(),
            "before": before[0].describe(),  # what an undo goes back to
            "requested_by": change.requested_by,
            "reason": change.reason,
        },
        rank,
    )


# -- as bytes in the flight recorder -------------------------------------------------------------


def encode_event(event: Event) -> bytes:
    """An event as the flight recorder keeps it."""
    fields = {name: getattr(event, name) for name in Event.__slots__}
    parameters = event.data.get("parameters", {})
    if len(parameters) > _MOST_NAMED:
        # The ends tell most: where a NaN entered is the last one.
        names = list(parameters)
        kept = names[: _MOST_NAMED // 2] + names[-_MOST_NAMED // 2 :]
        fields["data"] = {
            **event.data,
            "parameters": {name: parameters[name] for name in kept},
            "parameters_left_out": len(names) - len(kept),
        }
    return _encode(fields)


def encode_layers(
    step: int,
    grads: Sequence[float],
    weights: Sequence[float] | None = None,
    names: bytes | None = None,
) -> bytes:
    """One sample of the per-layer norms as the flight recorder keeps it; NaN where absent.

    In binary, by the parameters' position among those that the recorder's metadata names, so a
    sample at every step costs next to nothing. Where the optimizer has other parameters by now,
    `names` (see `encode_names`) go with the sample: a position would be that of another parameter.
    """
    tag = _LAYERS_TAG if names is None else _NAMED_LAYERS_TAG
    head = _LAYERS.pack(tag, weights is not None, len(grads), step)
    body = head + array("d", grads).tobytes()
    if weights is not None:
        body += array("d", weights).tobytes()
    return body if names is None else body + names


def layers_of(
    payload: bytes,
) -> tuple[int, list[float], list[float] | None, list[str] | None] | None:
    """Step, gradient norms, weight norms and names of what `encode_layers` wrote.

    None for anything else. Weight norms and names are None where the sample has none.
    """
    if payload[:1] not in {bytes([_LAYERS_TAG]), bytes([_NAMED_LAYERS_TAG])}:
        return None
    tag, with_weights, count, step = _LAYERS.unpack_from(payload)
    end = _LAYERS.size + count * (1 + with_weights) * 8
    if len(payload) < end or (tag == _LAYERS_TAG and len(payload) > end):
        msg = f"{len(payload)} bytes for the norms of {count} parameters"
        raise ValueError(msg)
    values = array("d")
    values.frombytes(payload[_LAYERS.size : end])
    numbers = values.tolist()
    names = [str(n) for n in lenient_json(payload[end:])] if tag == _NAMED_LAYERS_TAG else None
    return step, numbers[:count], numbers[count:] if with_weights else None, names


def encode_names(names: Sequence[str]) -> bytes:
    """The parameters' names as a sample carries them."""
    return _encode(list(names))


def _encode(body: Mapping[str, Any] | list[str]) -> bytes:
    # What is no text in UTF-8 (a file name may not be) becomes a question mark: no database
    # would take it.
    text = json.dumps(body, separators=(",", ":"), default=str, ensure_ascii=False)
    return text.encode("utf-8", "replace")


def decode(payload: bytes, names: Sequence[str] = ()) -> Event | LayerNorms | None:
    """What `encode_event` or `encode_layers` wrote; None for anything else.

    `names` are the parameters that the recorder's metadata names; one that has none is called by
    its position.
    """
    try:
        if (layers := layers_of(payload)) is not None:
            step, grads, weights, own = layers
            count = len(grads)
            names = names if own is None else own
            named = [*names[:count], *(f"parameter{i}" for i in range(len(names), count))]
            return LayerNorms(step, named, grads, weights or [math.nan] * count)
        event = Event(**lenient_json(payload))
        return event if _is_whole(event) else None
    except (ValueError, TypeError, KeyError, struct.error):
        return None


def _is_whole(event: Event) -> bool:
    """Whether the store would take it: one that was written over must not hold up the others."""
    texts = (event.kind, event.severity, event.message)
    return (
        all(isinstance(text, str) for text in texts)
        and whole(event.step) is not None
        and real(event.time) is not None
        and document(event.data) is not None
        and (event.rank is None or whole(event.rank) is not None)
    )
