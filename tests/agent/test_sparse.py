"""Sparse gradients: right for a global norm, refused by policies that look inside a gradient."""

import copy

import pytest
import torch
from loops import state_of, states_equal
from torch import nn

import gradwatch
from gradwatch.policies import AdaptiveGradientClip, ClipLayerNorm, ClipValue, SkipSpikes
from gradwatch.testing import MemorySink


class Bag(nn.Module):
    """An embedding, its gradient sparse or not, and a dense layer on top."""

    def __init__(self, *, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 6, sparse=sparse)
        self.head = nn.Linear(6, 1)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


def tokens(step):
    # The same token several times: an uncoalesced gradient, whose values are not its norm.
    return torch.randint(0, 10, (8, 5), generator=torch.Generator().manual_seed(step))


def backward(model, step, size=10.0):
    model.zero_grad()
    loss = size * model(tokens(step)).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_clip_norm_on_sparse_gradients_equals_dense_clipping(momentum):
    """Against `clip_grad_norm_` on the same model with a dense embedding, 10 steps."""
    sparse, dense = Bag(sparse=True), Bag(sparse=False)
    ours = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=momentum)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=momentum)
    agent = gradwatch.Agent(
        ours, clip=gradwatch.ClipNorm(0.5), store=(sink := MemorySink()), metrics_port=None
    )
    for step in range(10):
        backward(sparse, step)
        backward(dense, step)
        norm = nn.utils.clip_grad_norm_(dense.parameters(), 0.5)
        ours.step()
        theirs.step()
        assert agent.last.pre_norm == pytest.approx(float(norm), rel=1e-5)
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert agent.flush()
    assert any(s.clipped for s in sink.steps)


def test_observe_only_leaves_a_sparse_run_bit_identical():
    """SparseAdam, watched and not."""
    watched, plain = (nn.Embedding(20, 4, sparse=True) for _ in range(2))
    plain.load_state_dict(copy.deepcopy(watched.state_dict()))
    ours, theirs = (torch.optim.SparseAdam(m.parameters(), lr=0.1) for m in (watched, plain))
    sink = MemorySink()
    agent = gradwatch.Agent(ours, clip=gradwatch.ObserveOnly(), store=sink, metrics_port=None)
    for step in range(5):
        for model, optimizer in ((watched, ours), (plain, theirs)):
            optimizer.zero_grad()
            model(tokens(step)).square().sum().backward()
            optimizer.step()
    assert torch.equal(watched.weight, plain.weight)
    assert agent.flush()
    assert sink.steps[-1].pre_norm == pytest.approx(
        float(plain.weight.grad.to_dense().norm()), rel=1e-6
    )


@pytest.mark.parametrize("when", [0, 3])
def test_a_nonfinite_sparse_gradient_is_named_and_skipped(when):
    """Parameters and state untouched, on the first step too."""
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, model=model, store=(sink := MemorySink()), metrics_port=None)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(tokens(step)).square().sum()
        (loss * float("nan") if step == when else loss).backward()
        before, state = model.weight.detach().clone(), state_of(optimizer)
        optimizer.step()
        assert torch.equal(before, model.weight) == (step == when)
        assert states_equal(state, state_of(optimizer)) == (step == when)
    assert agent.flush()
    assert [e.data["parameters"] for e in sink.events if e.kind == "nonfinite_gradient"] == [
        {"weight": "nan"}
    ]


REFUSED = [ClipValue(0.1), ClipLayerNorm(1.0), AdaptiveGradientClip(), SkipSpikes(ClipValue(0.1))]


@pytest.mark.parametrize("policy", REFUSED, ids=str)
def test_others_are_refused_with_a_reason(policy):
    """At wrap where the model or the optimizer tells, else at the first step; nothing changes."""
    model = Bag(sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gradwatch.ConfigurationError, match="Embedding 'embedding' are sparse"):
        gradwatch.wrap(optimizer, model=model, clip=policy)
    adam = torch.optim.SparseAdam(model.embedding.parameters())
    with pytest.raises(gradwatch.ConfigurationError, match="SparseAdam are sparse"):
        gradwatch.wrap(adam, clip=policy)

    gradwatch.wrap(optimizer, clip=policy, store=MemorySink(), metrics_port=None)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(gradwatch.ConfigurationError, match=r"shape \(50, 6\) are sparse"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_dense_group_of_a_sparse_model_keeps_its_policy():
    """A policy each: what is refused is refused for the sparse group alone."""
    model = Bag(sparse=True)
    optimizer = torch.optim.SGD(
        [{"params": model.embedding.parameters()}, {"params": model.head.parameters()}], lr=0.1
    )
    clip = [gradwatch.ClipNorm(0.5), ClipValue(0.01)]
    gradwatch.wrap(optimizer, clip=clip, store=MemorySink(), metrics_port=None)
    backward(model, 0)
    optimizer.step()
    assert float(model.head.weight.grad.abs().max()) <= 0.01
    assert float(model.embedding.weight.grad.to_dense().norm()) <= 0.5 + 1e-6
    with pytest.raises(gradwatch.ConfigurationError, match="sparse"):
        gradwatch.wrap(optimizer, clip=clip[::-1], model=model, replace=True)
