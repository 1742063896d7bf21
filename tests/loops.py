"""Small models and loops that tests share."""

import copy
import itertools

import torch
from torch import nn

import gradwatch
from gradwatch.testing import MemorySink


def mlp(seed=0, sizes=(8, 16, 16, 1)):
    """A multi-layer perceptron with its own seed."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def twins(seed=0):
    """Two equal models."""
    model = mlp(seed)
    return model, copy.deepcopy(model)


def sgd(model=None, **options):
    """Plain SGD on a model, a small one of its own by default."""
    return torch.optim.SGD((model or mlp()).parameters(), lr=0.1, **options)


def one_parameter(kind=torch.optim.SGD, size=4, **options):
    """A weight of ones and the optimizer that has only this one."""
    weight = nn.Parameter(torch.ones(size))
    return weight, kind([weight], **{"lr": 0.1, **options})


def watched(optimizer, **arguments):
    """The agent of an optimizer, and where its records go: to memory, with no exporter."""
    sink = MemorySink()
    return gradwatch.Agent(optimizer, **{"store": sink, "metrics_port": None, **arguments}), sink


def step_once(optimizer, step=0):
    """A step with small gradients, a little greater at each step and parameter."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            p.grad = torch.full_like(p, 0.01 * (step + i + 1))
    optimizer.step()


def set_gradients(step, *models, size=1.0):
    """The same random gradients on each model, others at each step; their norm varies."""
    generator = torch.Generator().manual_seed(1000 + step)
    spread = size * 10 ** float(torch.rand((), generator=generator) * 2 - 1.5)
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator) * spread
        for parameter in parameters:
            parameter.grad = gradient.to(parameter.dtype).clone()


def train(model, optimizer, steps, *, seed=1, batch=16, scale=1.0, after_backward=None):
    """A regression loop; `after_backward(step, loss)` runs where a loop would clip."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        x = torch.randn(batch, 8, generator=generator)
        target = scale * x.sum(1, keepdim=True)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        if after_backward is not None:
            after_backward(step, loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters_equal(one, other):
    """Whether all parameters are bit-identical."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def greatest_difference(one, other):
    """The greatest absolute difference of any parameter."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).detach().abs().max().item() for a, b in pairs)


def state_of(optimizer):
    """All tensors of an optimizer's state, copied."""
    return [
        {key: copy.deepcopy(value) for key, value in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def states_equal(one, other):
    """Whether two results of `state_of` are bit-identical."""
    return len(one) == len(other) and all(
        a.keys() == b.keys()
        and all(
            torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
        )
        for a, b in zip(one, other, strict=True)
    )


def told_of(steps):
    """Of steps with one fault, those that have an event: the 1st, 2nd, 4th, 8th and so on."""
    return [step for count, step in enumerate(sorted(steps), 1) if count & (count - 1) == 0]
