"""Optimizers of torch, pytorch-optimizer and schedulefree, each made for one small model."""

import contextlib
import math
import random
import warnings

import numpy as np
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer
    import schedulefree
    from pytorch_optimizer.optimizer import (
        GSAM,
        TRAC,
        WSAM,
        FriendlySAM,
        Lookahead,
        LookSAM,
        OrthoGrad,
        PCGrad,
        ScheduleFreeWrapper,
    )

# What cannot be made here: it needs a package or a process group that is not there.
NOT_MADE = {"demo": "needs einops", "distributedmuon": "needs a process group"}
# What `wrap` refuses, because no step of it can be left out or none is ever called.
REFUSED = ("torch.LBFGS", "po.lbfgs", "po.lomo", "po.adalomo")


def model():
    """A small network, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def _adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def _muon(kind):
    def made(net):
        matrices = [p for p in net.parameters() if p.ndim >= 2]
        others = [p for p in net.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "use_muon": True},
            {"params": others, "use_muon": False},
        ]
        return kind(groups)

    return made


def _matrices(kind):
    return lambda net: kind([p for p in net.parameters() if p.ndim == 2], lr=0.01)


def _gsam(net):
    base = _sgd(net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0)
    rho = pytorch_optimizer.lr_scheduler.ProportionScheduler(scheduler, max_lr=0.05)
    return GSAM(net.parameters(), base, net, rho)


MADE_OTHERWISE = {
    "torch.Muon": _matrices(torch.optim.Muon),
    "po.adammini": pytorch_optimizer.load_optimizer("adammini"),
    "po.ranger21": lambda net: pytorch_optimizer.load_optimizer("ranger21")(
        net.parameters(), num_iterations=100
    ),
    "po.spectralsphere": _matrices(pytorch_optimizer.load_optimizer("spectralsphere")),
    "po.lomo": pytorch_optimizer.load_optimizer("lomo"),
    "po.adalomo": pytorch_optimizer.load_optimizer("adalomo"),
    **{
        f"po.{name}": _muon(pytorch_optimizer.load_optimizer(name))
        for name in ("muon", "adamuon", "adago", "muonclip", "normuon")
    },
    "sf.ScheduleFreeWrapper": lambda net: schedulefree.ScheduleFreeWrapper(_sgd(net)),
    "sf.ScheduleFreeWrapperReference": lambda net: schedulefree.ScheduleFreeWrapperReference(
        _sgd(net)
    ),
    # Around another optimizer.
    "around.Lookahead": lambda net: Lookahead(_adamw(net), k=2),
    "around.Lookahead, pullback": lambda net: Lookahead(
        _sgd(net), k=3, pullback_momentum="pullback"
    ),
    "around.TRAC": lambda net: TRAC(_adamw(net)),
    "around.OrthoGrad": lambda net: OrthoGrad(_adamw(net)),
    "around.PCGrad": lambda net: PCGrad(_adamw(net)),
    "around.Magma": lambda net: pytorch_optimizer.load_optimizer("magma")(_adamw(net)),
    "around.ScheduleFreeWrapper": lambda net: ScheduleFreeWrapper(_sgd(net)),
}

TWO_PASS = {
    "SAM": lambda net: pytorch_optimizer.SAM(net.parameters(), torch.optim.AdamW, lr=0.01),
    "SAM, adaptive": lambda net: pytorch_optimizer.SAM(
        net.parameters(), torch.optim.SGD, adaptive=True, use_gc=True, lr=0.05, momentum=0.9
    ),
    "LookSAM": lambda net: LookSAM(net.parameters(), torch.optim.AdamW, k=2, lr=0.01),
    "FriendlySAM": lambda net: FriendlySAM(net.parameters(), torch.optim.AdamW, lr=0.01),
    "WSAM": lambda net: WSAM(net, net.parameters(), torch.optim.AdamW, lr=0.01),
    "GSAM": _gsam,
    "BSAM": lambda net: pytorch_optimizer.load_optimizer("bsam")(net.parameters(), num_data=64),
}


def _plain(kind):
    def made(net):
        try:
            return kind(net.parameters(), lr=0.01)
        except TypeError:
            return kind(net.parameters())

    return made


def _all():
    made = {}
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            made[f"torch.{name}"] = _plain(kind)
    del made["torch.Optimizer"]
    for name in pytorch_optimizer.get_supported_optimizers():
        made[f"po.{name}"] = _plain(pytorch_optimizer.load_optimizer(name))
    for name, kind in vars(schedulefree).items():
        if isinstance(kind, type):
            made[f"sf.{name}"] = _plain(kind)
    made.update(MADE_OTHERWISE)
    for name in (*NOT_MADE, "bsam"):  # the latter is among those of two passes
        del made[f"po.{name}"]
    return made


OPTIMIZERS = _all()
NEEDS_A_CLOSURE = ("po.alig", "Closure")
SECOND_ORDER = ("po.adahessian", "po.sophiah")


class Loop:
    """A training loop over random batches, of which one may be spoilt by a NaN."""

    def __init__(self, make):
        self.net = model()
        self.optimizer = make(self.net)
        self.create_graph = False
        self.sparse = False
        if not isinstance(self.optimizer, nn.Module):
            with contextlib.suppress(AttributeError):
                self.optimizer.train()

    def backward(self, number, *, nan=False, everywhere=False):
        """Clear the gradients and make those of this batch; its loss."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(16, 6, generator=generator)
        for parameter in self.net.parameters():
            parameter.grad = None
        loss = nn.functional.mse_loss(self.net(x), x[:, :4] - 2 * x[:, 2:])
        if everywhere:
            loss = loss * math.nan
        loss.backward(create_graph=self.create_graph)
        if nan and not everywhere:
            with torch.no_grad():
                self.net[2].weight.grad[1, 1] = math.nan
        if self.sparse:
            for parameter in self.net.parameters():
                parameter.grad = parameter.grad.to_sparse()
        return loss.detach()

    def step(self, number, *, nan=False):
        """A step whose gradient is there before it."""
        self.backward(number, nan=nan)
        return self._seeded(number)

    def step_with_closure(self, number, *, nan=False):
        """A step whose gradient is made in its closure, at each evaluation anew."""
        return self._seeded(number, lambda: self.backward(number, nan=nan, everywhere=nan))

    def step_after_backward(self, number, *, nan=False):
        """A step with a gradient before it and another one in its closure."""
        self.backward(number, nan=nan, everywhere=nan)
        return self.step_with_closure(number, nan=nan)

    def step_with_loss(self, number, *, nan=False):
        """A step whose gradient is there before it, and whose closure only tells the loss."""
        loss = self.backward(number, nan=nan)
        return self._seeded(number, lambda: float(loss))

    def step_with_outputs(self, number, *, nan=False):
        """A step whose closure returns the outputs as well as the loss."""

        @torch.enable_grad()
        def closure():
            return None, self.backward(number, nan=nan, everywhere=nan)

        return self._seeded(number, closure)[1]

    def _seeded(self, number, *closure):
        torch.manual_seed(number)  # of those that draw numbers
        np.random.seed(number)
        random.seed(number)
        return self.optimizer.step(*closure)

    def result(self):
        """All that the steps have made: weights, state, groups and plain attributes."""
        return comparable([list(self.net.parameters()), self.optimizer])


_LEFT_OUT = (
    "grad_scale",
    "found_inf",
    "zero_grad",
    "step",
    "first_step",
    "second_step",
    "_opt_called",
)


def comparable(value, seen=()):
    """The value as plain data that `==` compares bit for bit, NaN as equal to NaN."""
    if isinstance(value, torch.Tensor):
        values = value.detach().cpu().contiguous()
        values = values.to_dense() if values.is_sparse else values
        return (str(values.dtype), tuple(values.shape), values.view(-1).view(torch.uint8).tolist())
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, dict):
        return [
            [key if isinstance(key, str) else "key", comparable(item, seen)]
            for key, item in value.items()
            if key not in _LEFT_OUT and not str(key).startswith(("_optimizer_", "_gradwatch"))
        ]
    if isinstance(value, (list, tuple, set)) or type(value).__name__ == "deque":
        return [comparable(item, seen) for item in value]
    if hasattr(value, "__dict__") and not callable(value) and id(value) not in seen:
        held = dict(vars(value))
        if isinstance(value, torch.optim.Optimizer) or hasattr(value, "param_groups"):
            held.update(param_groups=value.param_groups, state=value.state)
        return [type(value).__name__, comparable(held, (*seen, id(value)))]
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__
