"""A loop that clips by itself is recognised; loops that do not are left in peace."""

import io
import itertools
import math
import warnings
import weakref

import pytest
import torch
from loops import mlp, train
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch.testing import MemorySink

POLICIES = [gradwatch.ClipNorm(1.0), gradwatch.ClipNorm(0.5), gradwatch.ObserveOnly()]


def watch(clip=None, policy=POLICIES[0], *, steps=50, scale=1.0, **options):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    agent = gradwatch.Agent(optimizer, clip=policy, store=(sink := MemorySink()), metrics_port=None)

    def after_backward(step, loss):
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)

    train(model, optimizer, steps, scale=scale, after_backward=after_backward, **options)
    assert agent.flush()
    return sink


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("limit", [1.0, 0.5, 5.0, 0.01])
def test_a_loop_that_clips_is_recognised_within_50_steps(policy, limit, caplog):
    """Said once, with the line to take out, and on record as a finding."""
    sink = watch(limit, policy, scale=5.0)
    (finding,) = sink.findings
    assert finding.finding == "clipped_twice"
    assert finding.last_step < 50
    assert finding.data["limit"] == pytest.approx(limit, rel=1e-3)
    assert f"clip_grad_norm_(…, {limit:g})" in finding.advice
    said = [r for r in caplog.records if "clips by itself" in r.message]
    assert len(said) == 1


def test_a_loop_that_clips_scaled_gradients_is_not_told_their_number():
    """Without `unscale_`: what the norms end at is no threshold that anybody should set."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    agent = gradwatch.Agent(
        optimizer, clip=POLICIES[0], scaler=scaler, store=(sink := MemorySink()), metrics_port=None
    )
    for _ in range(50):
        optimizer.zero_grad()
        scaler.scale(5.0 * model(torch.randn(16, 8)).square().mean()).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert agent.flush()
    (finding,) = sink.findings
    assert finding.data["limit"] == pytest.approx(1 / 65536, rel=1e-3)
    assert "scaler.unscale_(optimizer)" in finding.advice
    assert "ClipNorm" not in finding.advice


def test_said_once_in_a_long_run(caplog):
    """Not again after 1,000 steps."""
    sink = watch(0.5, steps=1000, scale=5.0)
    assert len(sink.findings) == 1
    assert sum("clips by itself" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_loop_that_does_not_clip_is_left_in_peace(policy):
    """Our own clipping is not taken for the loop's."""
    assert not watch(None, policy, steps=400, scale=5.0).findings


def test_a_threshold_that_never_bites_is_not_a_finding():
    """`clip_grad_norm_` far above every norm hides nothing."""
    assert not watch(1e6, steps=400).findings


def test_full_batch_descent_is_not_taken_for_clipping():
    """Norms that hardly change from step to step are not a wall, accumulated or not."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(300):
        optimizer.zero_grad()
        for half in x.chunk(2):  # accumulation: gradients are changed in place
            model(half).square().mean().backward()
        optimizer.step()
    assert agent.flush()
    assert not sink.findings


def test_a_constant_gradient_is_not_taken_for_clipping():
    """The same norm at every step, bit for bit, is a gradient that does not change."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for _ in range(100):
        weight.grad = torch.tensor([3.0, 0.0, 4.0])
        weight.grad.mul_(1.0)
        optimizer.step()
    assert agent.flush()
    assert not sink.findings


def test_a_tensor_norm_of_many_elements_is_a_wall_too():
    """Torch's own float32 norm is off for a large tensor, so its wall lies beside the limit."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(2_000_000))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for _ in range(20):
        weight.grad = torch.randn(2_000_000, generator=generator)
        clip_grad_norm_([weight], 1.0)
        optimizer.step()
    assert agent.flush()
    assert len(sink.findings) == 1
    assert math.isclose(sink.findings[0].data["limit"], 1.0, rel_tol=1e-3)


def late(clip, *, to_none=True, fused=True, optimizer_class=torch.optim.AdamW, policy=POLICIES[0]):
    """A loop that does something to its gradients between `step()` and `zero_grad()`."""
    model = mlp()
    optimizer = optimizer_class(model.parameters(), lr=1e-3, fused=fused)
    agent = gradwatch.Agent(optimizer, clip=policy, store=(sink := MemorySink()), metrics_port=None)
    for _ in range(60):
        loss = (model(torch.randn(16, 8)) * 100).square().mean()
        loss.backward()
        optimizer.step()
        clip(model)
        optimizer.zero_grad(set_to_none=to_none)
    assert agent.flush()
    return sink


LIMITS = itertools.cycle([1e9, 0.1])
LATE = {
    "by norm": lambda model: clip_grad_norm_(model.parameters(), 0.1),
    "by norm, every other step": lambda model: clip_grad_norm_(model.parameters(), next(LIMITS)),
    "by value": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.01),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", LATE.values(), ids=LATE)
def test_a_loop_that_clips_after_the_step_is_recognised(clip, fused, caplog):
    """Said once, with what to do; its steps are those that were clipped in vain."""
    (finding,) = late(clip, fused=fused).findings
    assert finding.finding == "clip_after_step"
    assert 0 <= finding.first_step < finding.last_step < 30
    assert sum("clips after step()" in r.message for r in caplog.records) == 1


def test_a_gradient_that_other_losses_add_to_is_not_clipped():
    """A generator's loss goes through the discriminator, after the discriminator's step."""

    def through(model):
        model(torch.randn(16, 8)).square().mean().backward()

    assert not late(through).findings
    assert not late(lambda model: None).findings
    assert not late(lambda model: None, to_none=False).findings
    assert not late(LATE["by norm"], to_none=False).findings  # cannot be told: nothing is said


def test_measuring_after_the_step_is_no_clipping():
    """`clip_grad_norm_` at inf multiplies by 1; so does a threshold that never bites."""
    for limit in (math.inf, 1e30):
        assert not late(lambda model, to=limit: clip_grad_norm_(model.parameters(), to)).findings


def test_gradients_are_not_held_on_to_where_they_are_large():
    """One small gradient is what outlives its step."""
    model = torch.nn.Linear(300, 300, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gradwatch.wrap(optimizer, store=MemorySink(), metrics_port=None)
    model(torch.randn(8, 300)).square().mean().backward()
    optimizer.step()
    gone = weakref.ref(model.weight.grad)
    optimizer.zero_grad()
    assert gone() is None


ZEROES = {
    "not at all": lambda optimizer: None,
    "to None": lambda optimizer: optimizer.zero_grad(),
    "in place": lambda optimizer: optimizer.zero_grad(set_to_none=False),
    "through .data": lambda optimizer: [
        p.grad.data.zero_() for p in optimizer.param_groups[0]["params"] if p.grad is not None
    ],
}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("zero", ZEROES)
def test_a_loop_that_zeroes_nothing_is_recognised(zero, batches, fused, optimizer):
    """Told of the gradient itself; weights and gradients are those of a loop without the agent."""

    def loop(watched):
        torch.manual_seed(0)
        model = mlp()
        by = optimizer(model.parameters(), lr=1e-3, fused=fused)
        sink = MemorySink()
        agent = watched and gradwatch.Agent(by, clip=POLICIES[2], store=sink, metrics_port=None)
        for _ in range(60):
            ZEROES[zero](by)
            for _ in range(batches):
                model(torch.randn(16, 8)).square().mean().backward()
            by.step()
        if agent:
            agent.close()
        assert not any(p._backward_hooks for p in model.parameters())
        return sink.findings, [t for p in model.parameters() for t in (p, p.grad)]

    findings, tensors = loop(watched=True)
    _, alone = loop(watched=False)
    assert all(map(torch.equal, tensors, alone))
    # Of several batches a step, which are added rightly, nothing is said.
    forgotten = zero == "not at all" and batches == 1
    assert [f.finding for f in findings] == ["gradients_not_zeroed"] * forgotten
    assert all((f.severity, f.first_step, f.last_step) == ("critical", 4, 6) for f in findings)


@pytest.mark.parametrize("zero", ["not at all", "through .data"])
def test_one_batch_over_and_over_is_no_proof(zero):
    """A gradient that hardly changes looks like the one before, added to or not."""
    model, x = mlp(), torch.randn(64, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    agent = gradwatch.Agent(
        optimizer, clip=POLICIES[1], store=(sink := MemorySink()), metrics_port=None
    )
    for _ in range(50):
        ZEROES[zero](optimizer)
        model(x).square().mean().backward()
        optimizer.step()
    agent.close()
    assert [f.finding for f in sink.findings] == ["gradients_not_zeroed"] * (zero == "not at all")


def test_a_head_whose_loss_weighs_nothing_proves_nothing():
    """Its gradient is 0, and so is what is added: no sum, however it is zeroed."""
    body, head = torch.nn.Linear(8, 16), torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=1e-3)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for step in range(100):
        ZEROES["through .data"](optimizer)
        seen = body(torch.randn(16, 8))
        (seen.square().mean() + (step > 50) * head(seen[:, :4]).square().mean()).backward()
        optimizer.step()
    agent.close()
    assert not sink.findings


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_that_no_backward_pass_makes(trained, caplog):
    """Written by hand into the same tensor, as into a float32 master: all is on record, no hook stays."""
    weight = torch.nn.Parameter(torch.zeros(8), requires_grad=trained)
    weight.grad = torch.zeros(8)
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for _ in range(200):
        weight.grad.copy_(torch.randn(8))
        optimizer.step()
        assert len(weight._backward_hooks or ()) <= 1
    agent.close()
    assert len(sink.rows) == 200
    assert not sink.findings
    assert not caplog.records
    assert not weight._backward_hooks


def test_a_loop_that_is_not_mended_is_told_again_when_it_is_resumed():
    """In the same process: a new attempt is looked at anew."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for _ in range(2):
        for _ in range(20):
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()
        agent.load_state_dict(agent.state_dict())
    agent.close()
    assert [f.finding for f in sink.findings] == ["gradients_not_zeroed"] * 2


def test_an_agent_that_goes_away_leaves_no_hook():
    """Whenever it is closed; and while one is there, a tensor that is saved does not warn of it."""
    for steps in range(1, 10):
        weight = torch.zeros(8, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=1e-3)
        agent = gradwatch.Agent(optimizer, store=MemorySink(), metrics_port=None)
        for _ in range(steps):
            (weight - torch.randn(8)).square().sum().backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.save(weight, io.BytesIO())
        agent.close()
        assert not weight._backward_hooks
