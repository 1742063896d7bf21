"""Steps on a CUDA device without waiting for it: decided there, put on record when they arrive.

Where the threshold is known before the gradient is, and the optimizer's kernel reads `grad_scale`
and `found_inf` from the device, all that a step needs stays there: the norm, the divisor, and
whether the step is to be applied. The numbers come through pinned memory while the next steps run.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

from gradwatch.listing import Listing, every
from gradwatch.records import Measurement
from gradwatch.scaling import CLIP_EPSILON, DIVISOR_LIMIT
from gradwatch.shards import is_spread

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.names import Named
    from gradwatch.part import Part
    from gradwatch.scaling import Carrier
    from gradwatch.treatment import OpenStep, Treatment

__all__ = ["Arrival", "Arrived", "Deferred", "arrival", "on_a_device"]

DEVICES = frozenset({"cuda"})
# Slots of a forked child's parent: to free pinned memory there would call the device.
_left_behind: list[_Slot] = []
IN_FLIGHT = 2  # steps that may be on the device; with one more, the first is waited for


class Arrival(Protocol):
    """Whether what was sent before it has arrived: `torch.cuda.Event`, as far as it is used."""

    def record(self, stream: torch.cuda.Stream | None) -> None:
        """Mark this place in the device's queue."""

    def query(self) -> bool:
        """Whether the device has come so far."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Arrived:
    """A device that answers at once: the CPU."""

    def record(self, stream: torch.cuda.Stream | None) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Always."""
        return True

    def synchronize(self) -> None:
        """Do nothing."""


def arrival(device: torch.device) -> Arrival:
    """A new one for this device."""
    if device.type != "cuda":
        return Arrived()
    event: Arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event


class _Slot:
    """The memory of one step: a row on the device, and the same in pinned memory.

    The row (float64) holds each gradient's norm, the total, the loss scale, whether a scaler found
    an inf, the loss, the learning rate, and each weight's norm.
    """

    EXTRAS = 4

    def __init__(self, tensors: int, weights: int, device: torch.device) -> None:
        size = tensors + 1 + self.EXTRAS + weights
        self.device = device
        self.row = torch.zeros(size, dtype=torch.float64, device=device)
        self.host = torch.zeros(size, dtype=torch.float64, pin_memory=device.type == "cuda")
        self.norms = self.row[:tensors]
        self.total = self.row[tensors]
        self.extras = self.row[tensors + 1 : tensors + 1 + self.EXTRAS].unbind()
        self.weights = self.row[tensors + 1 + self.EXTRAS :]
        self.ratio = torch.zeros((), dtype=torch.float64, device=device)
        self.divisor = torch.zeros((), dtype=torch.float32, device=device)
        self.unfit = torch.zeros((), dtype=torch.float32, device=device)
        self.arrival = arrival(device)
        self.step: OpenStep
        self.params: Sequence[weakref.ref[Tensor]] = ()
        self.known: list[float | None] = []  # the extras that were never on the device
        self.sampled = self.with_weights = self.has_loss = self.scaled = False

    def fits(self, tensors: int, weights: int, device: torch.device) -> bool:
        """Whether it can be used for a step of these sizes."""
        return (len(self.norms), len(self.weights), self.device) == (tensors, weights, device)

    def take_along(self, *values: Tensor | float | None) -> None:
        """Put the extras beside the norms; what is a number here already stays here."""
        self.known = []
        for place, value in zip(self.extras, values, strict=True):
            if isinstance(value, torch.Tensor) and value.device.type in DEVICES:
                place.copy_(value.detach().reshape(()), non_blocking=True)
                self.known.append(None)
            else:
                self.known.append(math.nan if value is None else float(value))

    def send(self) -> None:
        """Let it all come to this side, in the device's own time."""
        self.host.copy_(self.row, non_blocking=True)
        # The device of the row, which need not be the current one.
        on_cuda = self.device.type == "cuda"
        self.arrival.record(torch.cuda.current_stream(self.device) if on_cuda else None)

    def received(self) -> tuple[list[float], float, list[float], list[float]]:
        """Norms, total, extras, weight norms; once it has arrived."""
        values: list[float] = self.host.tolist()
        tensors = len(self.norms)
        first_weight = tensors + 1 + self.EXTRAS
        extras = [
            there if here is None else here
            for here, there in zip(self.known, values[tensors + 1 : first_weight], strict=True)
        ]
        return values[:tensors], values[tensors], extras, values[first_weight:]


class Deferred:
    """The steps of one optimizer that are decided on its device. Used by the training thread."""

    def __init__(self, part: Part, carrier: Carrier, treat: Treatment) -> None:
        self._part = part
        self._carrier = carrier
        self._treat = treat
        # The parameters that had a gradient at the last step. They are held weakly: a parameter may
        # own its optimizer, which must be free to go.
        self._listing = Listing()
        self._named: Named | None = None  # what they are called
        self._listed: list[str] = []  # all that the optimizer lists
        self._states = 0  # of them that had a state at the last step
        self._suited = False  # whether these can be measured on one device
        self._free: list[_Slot] = []
        self._settling = threading.RLock()  # `agent.flush()` may be called from any thread
        self._begun: _Slot | None = None
        self._pending: deque[_Slot] = deque()
        self.warm = False  # a step with these parameters was applied: the optimizer has its state

    def begin(
        self,
        optimizer: Optimizer,
        step: OpenStep,
        loss: Tensor | float | None,
        loss_scale: Callable[[], Tensor | float] | None,
    ) -> bool:
        """Decide this step on the device; False where it has to be looked at from here.

        That is so for the first step with any set of parameters: a kernel that is told to skip its
        very first step leaves fused SGD's momentum uninitialised.
        """
        policy, mode = self._part.policy, self._treat.on_nonfinite
        if not policy.ahead or mode == "raise":
            return False
        if (mode == "skip" or policy.changes_gradients) and not self._carrier.can_fold(optimizer):
            return False
        params, grads = self._part.gradients(optimizer)
        if self._listing.changed(params):
            self.warm = False
            self._suited = (
                bool(grads)
                # A kernel divides the gradient of a parameter that is listed twice at each mention.
                and self._listing.first is None
                and _suited([*grads, *every(optimizer)])
            )
            self._named, self._listed = None, []
        states, self._states = self._states, len(optimizer.state)
        if not self._suited or not self.warm or self._states < states:
            return False
        if self._named is None:
            self._named = self._treat.notices.named(params, optimizer)
        with torch.no_grad():
            slot = self._slot(optimizer, step.number, grads)
            slot.step, slot.params, slot.has_loss = step, self._listing.refs, loss is not None
            step.named, step.listed = self._named, self._listed
            self._treat.note_changes(step, grads)
            self._measure(optimizer, slot, grads)
            scale, found_inf = self._carrier.left_by_scaler(optimizer)
            slot.scaled = scale is not None
            # A scaler keeps its own on the device of the loss, with a model over several GPUs.
            here, inf_here = _on(slot.device, scale), _on(slot.device, found_inf)
            unfit = self._unfit(slot, inf_here) if mode == "skip" else None
            divisor = self._divisor(slot, here, step.threshold, whole=mode == "skip")
            known_scale = loss_scale() if scale is None and loss_scale is not None else scale
            slot.take_along(known_scale, found_inf, loss, optimizer.param_groups[0].get("lr"))
            slot.send()
        # Last, so that nothing is set where something before it fails.
        self._carrier.leave_to_kernel(optimizer, divisor, unfit)
        self._begun = slot
        return True

    def keep(self) -> None:
        """The step that was begun last was taken: it is to be put on record."""
        if self._begun is not None:
            self._pending.append(self._begun)
            self._begun = None

    def settle(
        self,
        write: Callable[[OpenStep], None],
        optimizer: Optimizer | None,
        *,
        all_of_them: bool = False,
    ) -> None:
        """Hand on the steps that have arrived, in their order; wait where too many have not."""
        pending = self._pending
        with self._settling:
            while pending and (
                all_of_them or len(pending) > IN_FLIGHT or pending[0].arrival.query()
            ):
                slot = pending.popleft()
                slot.arrival.synchronize()
                self._free.append(slot)
                self._complete(slot, optimizer)
                write(slot.step)

    def forget(self) -> None:
        """Let go of all steps (in a forked child, which has no device)."""
        _left_behind.extend([*self._pending, *self._free])
        self._begun, self._pending, self._free = None, deque(), []
        self._settling = threading.RLock()

    # -- on the device -------------------------------------------------------------------------

    def _slot(self, optimizer: Optimizer, number: int, grads: Sequence[Tensor]) -> _Slot:
        notices = self._treat.notices
        sampled, with_weights = notices.samples(number)
        if sampled or not self._listed:
            self._listed = notices.listed(optimizer)
        sizes = len(grads), len(self._listed), grads[0].device
        while self._free:
            slot = self._free.pop()
            if slot.fits(*sizes):
                break
        else:
            slot = _Slot(*sizes)
        slot.sampled, slot.with_weights = sampled, with_weights
        return slot

    def _measure(self, optimizer: Optimizer, slot: _Slot, grads: list[Tensor]) -> None:
        """Norms in float64, in which no square of a float32 overflows or vanishes."""
        norm_type = self._part.policy.norm_type
        norms = torch._foreach_norm(grads, norm_type, dtype=torch.float64)
        torch.stack(norms, out=slot.norms)
        torch.linalg.vector_norm(slot.norms, norm_type, out=slot.total)
        if slot.with_weights:
            weights = torch._foreach_norm(every(optimizer), 2.0, dtype=torch.float64)
            torch.stack(weights, out=slot.weights)

    def _unfit(self, slot: _Slot, found_inf: Tensor | None) -> Tensor:
        """1.0 where the kernel is to leave the step out, else 0.0: it knows no other numbers."""
        unfit = torch.logical_not(torch.lt(slot.total, math.inf), out=slot.unfit)
        if found_inf is not None:
            torch.maximum(unfit, found_inf.reshape(()), out=unfit)
        return unfit

    def _divisor(
        self, slot: _Slot, scale: Tensor | None, threshold: float, *, whole: bool
    ) -> Tensor | None:
        """What the kernel divides by: the loss scale, times max(1, (norm + 1e-6) / threshold).

        Unless steps with NaN or inf are left out as a `whole`, they are applied unclipped.
        """
        if math.isnan(threshold):
            return None
        ratio = torch.mul(slot.total, 1.0 / threshold, out=slot.ratio)
        if scale is not None:
            ratio.div_(scale.reshape(()))
        ratio.add_(CLIP_EPSILON / threshold)
        if not whole:
            ratio.nan_to_num_(nan=1.0, posinf=1.0)
        ratio.clamp_(min=1.0)
        if scale is not None:
            ratio.mul_(scale.reshape(()))
        return slot.divisor.copy_(ratio.clamp_(max=DIVISOR_LIMIT))

    # -- once it is here -----------------------------------------------------------------------

    def _complete(self, slot: _Slot, optimizer: Optimizer | None) -> None:
        """Fill the step in, and note what is worth noting about it."""
        step = slot.step
        norms, total, (scale, found_inf, loss, step.lr), weights = slot.received()
        step.loss = loss if slot.has_loss else None
        step.loss_scale = scale
        in_memory = scale if slot.scaled else 1.0
        measured = Measurement(
            total / in_memory,
            self._part.policy.norm_type,
            [norm / in_memory for norm in norms],
            [param for ref in slot.params if (param := ref()) is not None],
            (),
            in_memory,
        )
        step.measured = (measured,)
        if found_inf > 0.0:  # NaN where there is no scaler
            self._treat.overflow(step)
            return
        noted = self._treat.complete(optimizer, step)
        if slot.sampled or noted:
            self._treat.sample(optimizer, step, weights if slot.with_weights else None)


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=True)


def on_a_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer's parameters are where steps may be deferred."""
    return any(
        param.device.type in DEVICES
        for group in optimizer.param_groups
        for param in group["params"]
    )


def _suited(tensors: Sequence[Tensor]) -> bool:
    """Whether one foreach call measures them all: dense and real, on one device deferred to."""
    first = tensors[0].device if tensors else torch.device("cpu")
    return first.type in DEVICES and all(
        tensor.device == first
        and tensor.layout is torch.strided
        and tensor.is_floating_point()
        and tensor.numel() > 0
        and not is_spread(tensor)
        for tensor in tensors
    )
