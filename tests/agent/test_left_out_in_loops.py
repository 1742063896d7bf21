"""A step that is left out, and all that a loop has around its optimizer."""

import copy
import math
import warnings

import accelerate
import pytest
import torch
import zoo
from loops import greatest_difference, mlp, parameters_equal, set_gradients, twins, watched
from torch.amp import GradScaler

from gradwatch import ClipNorm, SkipSpikes

STEPS = 8
SPOILT = (0, 3)


def spoil(model):
    with torch.no_grad():
        model[0].weight.grad[0, 0] = math.nan


def muon(model):
    """An optimizer that changes weights without a gradient too."""
    return zoo.OPTIMIZERS["po.adamuon"](model)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=40),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [3],
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["foreach", "kernel"])
@pytest.mark.parametrize("before", [True, False], ids=["made before wrap", "made after wrap"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_without_a_word(name, before, kind):
    """It has its rate for each step, those left out too, as after `GradScaler.step`."""
    ours, theirs = twins()
    options = {"fused": True} if kind is torch.optim.AdamW else {"momentum": 0.9}
    wrapped = kind(ours.parameters(), lr=0.01, **options)
    plain = kind(theirs.parameters(), lr=0.01, **options)
    if before:
        scheduler = SCHEDULERS[name](wrapped)
    agent, sink = watched(wrapped, clip=ClipNorm(1e6))
    if not before:
        scheduler = SCHEDULERS[name](wrapped)
    their_scheduler = SCHEDULERS[name](plain)
    plateau = name == "ReduceLROnPlateau"
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(STEPS):
            set_gradients(step, ours, theirs)
            if step in SPOILT:
                spoil(ours)
            wrapped.step()
            scheduler.step(*[1.0] * plateau)
            rates.append(wrapped.param_groups[0]["lr"])
    their_rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loop that leaves out its first step
        for step in range(STEPS):
            set_gradients(step, theirs)
            if step not in SPOILT:
                plain.step()
            their_scheduler.step(*[1.0] * plateau)
            their_rates.append(plain.param_groups[0]["lr"])
    assert rates == their_rates
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert [record.skipped for record in sink.steps] == [s in SPOILT for s in range(STEPS)]


def loop_of(model, optimizer, step, *, between=lambda: None):
    """Steps on set gradients, of which two are spoilt; `step` is how the loop calls it."""
    for number in range(STEPS):
        set_gradients(number, model)
        if number in SPOILT:
            spoil(model)
        between()
        before = zoo.comparable([list(model.parameters()), optimizer])
        step()
        left_out = zoo.comparable([list(model.parameters()), optimizer]) == before
        assert left_out == (number in SPOILT)


def test_a_step_that_a_scaler_calls():
    """Unscaled by it, and not called by it where it found the NaN itself."""
    model = mlp()
    optimizer = muon(model)
    scaler = GradScaler("cpu", init_scale=1.0)
    agent, sink = watched(optimizer, scaler=scaler)

    def step():
        scaler.step(optimizer)
        scaler.update(1.0)

    scaler.scale(torch.ones(()))
    loop_of(model, optimizer, step)
    assert agent.flush()
    assert [record.skipped for record in sink.steps] == [s in SPOILT for s in range(STEPS)]


@pytest.mark.parametrize("make", [muon, lambda model: torch.optim.AdamW(model.parameters(), fused=True)],
                         ids=["muon", "kernel"])  # fmt: skip
def test_a_step_after_clip(make):
    """`agent.clip()` has seen the NaN; the step is left out."""
    model = mlp()
    optimizer = make(model)
    agent, sink = watched(optimizer)
    loop_of(model, optimizer, optimizer.step, between=agent.clip)
    assert agent.flush()
    assert [record.skipped for record in sink.steps] == [s in SPOILT for s in range(STEPS)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["po.lion", "torch.AdamW"])
def test_a_compiled_step(name):
    """`torch.compile(optimizer.step)` is left out like any other, at the first step and later."""
    model = mlp()
    optimizer = zoo.OPTIMIZERS[name](model)
    agent, sink = watched(optimizer)
    loop_of(model, optimizer, torch.compile(optimizer.step, backend="eager"))
    torch._dynamo.reset()
    assert agent.flush()
    assert [record.skipped for record in sink.steps] == [s in SPOILT for s in range(STEPS)]


def test_a_step_that_a_policy_skips():
    """`SkipSpikes` too means no step: no momentum, no weight decay, no counter."""
    model = mlp()
    optimizer = muon(model)
    agent, sink = watched(optimizer, clip=SkipSpikes(ClipNorm(1e6), window=8, sigma=2.0))
    skipped = 0
    for number in range(30):
        set_gradients(0, model, size=1 + number % 3 / 10)
        if number == 20:
            for parameter in model.parameters():
                parameter.grad *= 1e4
        before = zoo.comparable([list(model.parameters()), optimizer])
        optimizer.step()
        if agent.last.skipped:
            skipped += 1
            assert zoo.comparable([list(model.parameters()), optimizer]) == before
    assert agent.flush()
    assert skipped == 1
    assert [record.step for record in sink.steps if record.skipped] == [20]


def test_a_step_through_accelerate():
    """`accelerator.prepare` stands before the optimizer, and knows nothing of it."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = mlp()
    prepared, optimizer = accelerator.prepare(model, muon(model))
    agent, sink = watched(optimizer)
    loop_of(prepared, optimizer.optimizer, optimizer.step)
    assert agent.flush()
    assert [record.skipped for record in sink.steps] == [s in SPOILT for s in range(STEPS)]


def test_a_checkpoint_after_a_step_that_was_left_out_is_that_before_it():
    """`state_dict` of a first step that was left out is that of a fresh optimizer, and loads."""
    ours, theirs = twins()
    wrapped, plain = muon(ours), muon(theirs)
    watched(wrapped)
    set_gradients(0, ours)
    spoil(ours)
    wrapped.step()
    assert zoo.comparable(wrapped.state_dict()) == zoo.comparable(plain.state_dict())
    plain.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    set_gradients(1, ours, theirs)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    wrapped.step()
    plain.step()
    assert greatest_difference(ours, theirs) < 1e-6


def test_the_hooks_of_others_are_not_called_in_a_step_that_is_left_out():
    """Torch calls them around a step; there is none. Those before ours have been called already."""
    model, twin = twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before ours"))
    watched(optimizer)
    optimizer.register_step_pre_hook(lambda *_: called.append("after ours"))
    optimizer.register_step_post_hook(lambda *_: called.append("afterwards"))
    set_gradients(0, model)
    spoil(model)
    optimizer.step()
    assert called == ["before ours"]
    assert parameters_equal(model, twin)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("inner", "told"), [("torch.AdamW", 0), ("po.lion", 1)], ids=["torch's", "another's"]
)
def test_an_optimizer_that_communicates_in_its_step_is_told_at_wrap(inner, told, tmp_path, caplog):
    """Its step is taken without gradients, in which only torch's own are sure to change nothing."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        model = mlp()
        kind = type(zoo.OPTIMIZERS[inner](mlp()))
        optimizer = ZeroRedundancyOptimizer(model.parameters(), kind, lr=0.01)
        agent, _ = watched(optimizer)
        agent.close()
    finally:
        torch.distributed.destroy_process_group()
    words = [r.getMessage() for r in caplog.records if "communicates within step()" in r.message]
    assert len(words) == told
