"""Each way in which `GradScaler.step` hands an optimizer over, against a loop without a scaler.

The ways are those of `torch.amp.GradScaler.step`, from its top to its end:

- the scaler is off: `step()`;
- the class says `_step_supports_amp_scaling`, and its `step` takes `grad_scaler`: the scaler is handed
  over itself, with the gradients still scaled or already unscaled (the protocol of apex);
- the class says so, and its `step` does not take it: `grad_scale` and `found_inf` are set on it;
- any other: unscaled by the scaler, and not called at all where there is an inf.
"""

import math

import pytest
import torch
from loops import greatest_difference, told_of, twins, watched
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.nn.utils import clip_grad_norm_

from gradwatch import ClipNorm

pytestmark = pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself")

SCALE = 2.0**10
OVERFLOWS = (0, 4, 5)
STEPS = 9


class Momentum(torch.optim.SGD):
    """SGD with momentum that skips and unscales by itself."""

    _step_supports_amp_scaling = True

    def _apply(self, scale, found_inf):
        if found_inf:
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(0.9).add_(p.grad / scale)
                with torch.no_grad():
                    p.add_(buffer, alpha=-group["lr"])


class Handed(Momentum):
    """It takes the scaler, as apex's fused optimizers do."""

    def step(self, closure=None, grad_scaler=None):
        """Ask the scaler for all that there is to know."""
        assert closure is None
        if grad_scaler is None or not grad_scaler.is_enabled():
            return self._apply(1.0, found_inf=False)
        state = grad_scaler._per_optimizer_states[id(self)]
        unscaled = state["stage"] is OptState.UNSCALED
        if not unscaled:
            grad_scaler._check_inf_per_device(self)
        found = any(float(inf) for inf in state["found_inf_per_device"].values())
        return self._apply(1.0 if unscaled else grad_scaler.get_scale(), found)


class HandedByKeyword(Handed):
    """It takes the scaler by keyword only."""

    def step(self, *, grad_scaler=None):
        """As above."""
        return super().step(None, grad_scaler)


class Attributes(Momentum):
    """It reads what the scaler sets on it, in a step of its own."""

    def step(self, closure=None):
        """Unscale by `grad_scale`; skip where `found_inf` says so."""
        assert closure is None
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        return self._apply(1.0 if scale is None else float(scale), bool(found_inf or 0.0))


def sgd(params, lr, **options):
    return torch.optim.SGD(params, lr=lr, momentum=0.9, **options)


KINDS = {
    "unscaled for it": sgd,
    "torch's fused": lambda params, lr: sgd(params, lr, fused=True),
    "attributes": Attributes,
    "handed": Handed,
    "handed by keyword": HandedByKeyword,
}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=generator)
    return x, 5 * x.sum(1, keepdim=True)


def loss_of(model, step):
    x, target = batch(step)
    return torch.nn.functional.mse_loss(model(x), target)


def reference(model):
    """Torch alone, without a scaler and without the steps that overflow: the true norms."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    norms = {}
    for step in range(STEPS):
        if step in OVERFLOWS:
            continue
        optimizer.zero_grad()
        loss_of(model, step).backward()
        norms[step] = float(clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    return norms


# Without `scaler=`, clip() needs unscale_ before it, as torch's clip_grad_norm_ does.
HOWS = [("", False), ("", True), ("unscale_", False), ("unscale_", True), ("clip", True),
        ("unscale_, clip", False), ("unscale_, clip", True)]  # fmt: skip


@pytest.mark.parametrize(("how", "given"), HOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_step_is_measured_and_clipped_as_without_a_scaler(kind, how, given):
    """True norms, torch's weights, overflows as such, and a scaler that backs off and goes on."""
    ours, theirs = twins()
    norms = reference(theirs)
    optimizer = KINDS[kind](ours.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=SCALE)
    agent, sink = watched(
        optimizer, clip=ClipNorm(1.0), on_nonfinite="raise", **{"scaler": scaler} if given else {}
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(ours, step) * (1e38 if step in OVERFLOWS else 1.0)
        scaler.scale(loss).backward()
        if "unscale_" in how:
            scaler.unscale_(optimizer)
        if "clip" in how:
            agent.clip()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == SCALE / 2 ** len(OVERFLOWS)
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    recorded = {record.step: record for record in sink.steps}
    # Without `scaler=`, nobody sees the steps for which the scaler does not call the optimizer.
    unseen = () if given or kind != "unscaled for it" else OVERFLOWS
    assert len(recorded) == STEPS - len(unseen)
    seen = [step for step in range(STEPS) if step not in unseen]
    for step, record in zip(seen, sink.steps, strict=True):
        if step in OVERFLOWS:
            assert record.skipped
            assert not record.nonfinite
            assert math.isnan(record.pre_norm)
        else:
            assert record.pre_norm == pytest.approx(norms[step], rel=1e-5)
            assert record.post_norm == pytest.approx(min(norms[step], 1.0), rel=1e-5)
            assert record.clipped == (norms[step] > 1.0)
            assert not record.skipped
    kinds = [event.kind for event in sink.events if event.severity != "warning"]
    assert kinds == ["amp_overflow"] * len(told_of(set(OVERFLOWS) - set(unseen)))


@pytest.mark.parametrize("given", [False, True], ids=["", "scaler="])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_that_is_off_is_no_scaler(kind, given):
    """The optimizer's own `step` is called, with no scale and no word of one."""
    ours, theirs = twins()
    norms = reference(theirs)
    optimizer = KINDS[kind](ours.parameters(), lr=0.01)
    scaler = GradScaler("cpu", enabled=False)
    agent, sink = watched(optimizer, clip=ClipNorm(1.0), **{"scaler": scaler} if given else {})
    for step in norms:
        optimizer.zero_grad()
        scaler.scale(loss_of(ours, step)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert [r.pre_norm for r in sink.steps] == pytest.approx(list(norms.values()), rel=1e-5)
    assert all(math.isnan(r.loss_scale) for r in sink.steps)


@pytest.mark.parametrize(("how", "given"), [("", False), ("", True), ("clip", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_has_fallen_to_zero_is_an_overflow_each_time(kind, how, given):
    """A GradScaler halves without end: nothing is applied from then on, and it is told so."""
    model, untouched = twins()
    optimizer = KINDS[kind](model.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=1e-45)
    agent, sink = watched(optimizer, **{"scaler": scaler} if given else {})
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step) * (1e38 * 1e38)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 0.0
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if how == "clip":
            agent.clip()
        scaler.step(optimizer)
        scaler.update()
    assert greatest_difference(model, untouched) == 0.0
    assert agent.flush()
    # Without `scaler=`, only the NaN is seen that unscaling by 0 makes of a gradient of 0.
    unseen = not given and kind == "unscaled for it"
    assert all(r.skipped and not r.clipped for r in sink.steps)
    assert len(sink.steps) == (3 if unseen else 7)
    told = {event.kind for event in sink.events}
    assert told == ({"amp_overflow"} if not unseen else {"nonfinite_gradient"})


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_scaler_refuses_it_refuses_of_a_watched_optimizer_too(kind):
    """A second `step` before `update`, and a closure."""
    model, _ = twins()
    optimizer = KINDS[kind](model.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=SCALE)
    agent, sink = watched(optimizer, scaler=scaler)
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="[Cc]losure"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.scale(loss_of(model, 2)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert agent.flush()
    assert [record.step for record in sink.steps] == [0, 1]
