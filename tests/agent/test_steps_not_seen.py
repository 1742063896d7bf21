"""A watch that never sees a step says so; optimizers that are used in other ways are watched."""

import gc
import subprocess
import sys
import textwrap

import accelerate
import pytest
import torch
import zoo
from loops import mlp, set_gradients, sgd, watched
from torch.nn.utils import clip_grad_norm_, get_total_norm

import gradwatch
from gradwatch.errors import ConfigurationError


def loss_of(model, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 8, generator=generator)
    return torch.nn.functional.mse_loss(model(x), 5 * x.sum(1, keepdim=True))


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization as its best-known implementation has it (davda54/sam)."""

    def __init__(self, params, base_optimizer, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        params = [p for group in self.param_groups for p in group["params"]]
        scale = self.param_groups[0]["rho"] / (get_total_norm([p.grad for p in params]) + 1e-12)
        for p in params:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


def two_passes(model, optimizer, number, *, factor=1.0, clip=None):
    """One step of such a loop; one that clips by itself does so before the second pass."""
    (loss_of(model, number) * factor).backward()
    optimizer.first_step(zero_grad=True)
    (loss_of(model, number) * factor).backward()
    norm = None if clip is None else clip_grad_norm_(model.parameters(), clip)
    optimizer.second_step(zero_grad=True)
    return norm


def test_sam_driven_by_its_two_passes_is_clipped_and_recorded():
    """As `clip_grad_norm_` before the second pass; a step with a NaN is as if it had never been."""
    models = [mlp(), mlp()]
    ours, theirs = (Sam(m.parameters(), torch.optim.AdamW, lr=0.01) for m in models)
    agent, sink = watched(ours)
    assert gradwatch.Agent.of(ours) is gradwatch.Agent.of(ours.base_optimizer) is agent
    norms = []
    for number in range(12):
        if number in {0, 5}:
            before = [p.detach().clone() for p in models[0].parameters()]
            two_passes(models[0], ours, number, factor=float("nan"))
            assert all(map(torch.equal, before, models[0].parameters()))
        two_passes(models[0], ours, number)
        norms.append(float(two_passes(models[1], theirs, number, clip=1.0)))
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert agent.flush()
    recorded = [s.pre_norm for s in sink.steps if not s.skipped]
    assert recorded == pytest.approx(norms, rel=1e-5)
    assert [s.step for s in sink.steps if s.nonfinite] == [0, 6]
    methods = ("step", "first_step", "second_step")
    assert {"first_step", "second_step"} <= set(vars(ours))
    agent.close()
    assert not set(methods) & set(vars(ours))
    two_passes(models[0], ours, 12)


@pytest.mark.parametrize("how", ["raise", "ignore"])
def test_sam_with_a_nan_that_is_not_skipped(how):
    """Raised with the weights where they were; ignored as without us."""
    model = mlp()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.01)
    watched(optimizer, on_nonfinite=how)
    before = [p.detach().clone() for p in model.parameters()]
    if how == "ignore":
        two_passes(model, optimizer, 0, factor=float("nan"))
        assert all(p.isnan().all() for p in model.parameters())
        return
    with pytest.raises(gradwatch.NonFiniteGradientError):
        two_passes(model, optimizer, 0, factor=float("nan"))
    assert all(map(torch.equal, before, model.parameters()))


class Alike:
    """It is used like an optimizer, and is none by its class."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.taken = 0

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.taken += 1
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1)
        return loss


class Unmade(Alike, torch.optim.Optimizer):
    """An Optimizer by its class that never called `Optimizer.__init__`."""


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("kind", [Alike, Unmade])
def test_what_never_called_the_init_of_optimizer_is_watched(kind, with_closure):
    """Clipped as torch clips, recorded, and a NaN step left out."""
    model, twin = mlp(), mlp()
    ours, theirs = kind(model.parameters()), kind(twin.parameters())
    agent, sink = watched(ours)
    norms = []
    for number in range(6):

        def closure(number=number):
            ours.zero_grad()
            loss = loss_of(model, number) * (float("nan") if number == 3 else 1.0)
            loss.backward()
            return loss

        if with_closure:
            assert ours.step(closure) is not None
        else:
            closure()
            ours.step()
        if number != 3:
            theirs.zero_grad()
            loss_of(twin, number).backward()
            norms.append(float(clip_grad_norm_(twin.parameters(), 1.0)))
            theirs.step()
    assert ours.taken == 5
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert agent.flush()
    assert [s.pre_norm for s in sink.steps if not s.skipped] == pytest.approx(norms, rel=1e-5)
    agent.close()
    assert "step" not in vars(ours)


@pytest.mark.parametrize(
    "given",
    [
        mlp(),
        "adam",
        None,
        {"a": sgd()},
        type("Groups", (), {"param_groups": [{}], "step": print})(),
    ],
    ids=["model", "text", "None", "dict", "no params"],
)
def test_what_is_no_optimizer_is_refused(given):
    """By the name of its class."""
    with pytest.raises(ConfigurationError, match=f"Optimizer, not {type(given).__name__}"):
        gradwatch.wrap(given)


# -- no step is ever seen --------------------------------------------------------------------------


def by_another(model, watched_one):
    other = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(number):
        watched_one.zero_grad()
        loss_of(model, number).backward()
        other.step()

    return step


def by_another_with_its_own_zero_grad(model, watched_one):
    del watched_one
    other = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(number):
        other.zero_grad()
        loss_of(model, number).backward()
        other.step()

    return step


def by_hand(model, watched_one):
    del watched_one

    def step(number):
        for p in model.parameters():
            p.grad = None
        loss_of(model, number).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.01)

    return step


LOOPS = [by_another, by_another_with_its_own_zero_grad, by_hand]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_whose_steps_are_not_seen_is_told_so(loop, caplog):
    """Within 50 of them, once, and who takes them where that can be found."""
    model = mlp()
    optimizer = sgd(model)
    agent, sink = watched(optimizer)
    step = loop(model, optimizer)
    for number in range(45):
        step(number)
    assert "step()" not in caplog.text
    for number in range(45, 120):
        step(number)
    assert caplog.text.count("step() of the wrapped SGD was not called") == 1
    assert ("AdamW holds the same parameters" in caplog.text) == (loop is not by_hand)
    agent.close()
    assert caplog.text.count("was not called") == 1
    assert not sink.steps


def test_a_loop_that_accumulates_no_gradient_is_told_so(caplog):
    """By its calls of `zero_grad()`."""
    model = mlp()
    optimizer = sgd(model)
    watched(optimizer)
    params = list(model.parameters())
    for number in range(60):
        optimizer.zero_grad()
        grads = torch.autograd.grad(loss_of(model, number), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p.sub_(g, alpha=0.01)
    assert caplog.text.count("step() of the wrapped SGD was not called") == 1


@pytest.mark.parametrize("count", [1, 20])
def test_a_short_loop_is_told_at_the_end(count, caplog):
    """When the agent is closed; weights that changed are enough."""
    model = mlp()
    optimizer = sgd(model)
    agent, _ = watched(optimizer)
    step = by_hand(model, optimizer)
    for number in range(count):
        step(number)
    assert not caplog.text
    agent.close()
    assert f"{count} backward pass{'es' if count > 1 else ''} went by" in caplog.text
    quiet, _ = watched(sgd(other := mlp()))
    with torch.no_grad():
        other[0].weight.add_(1.0)
    quiet.close()
    assert "the weights changed went by" not in caplog.text
    assert "the weights changed" in caplog.text


def test_a_loop_is_told_at_exit_by_the_process(tmp_path):
    """A script that never closes anything."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent("""
            import torch, gradwatch
            weight = torch.nn.Parameter(torch.ones(4))
            optimizer = torch.optim.SGD([weight], lr=0.1)
            gradwatch.wrap(optimizer, metrics_port=None)
            for _ in range(3):
                weight.grad = None
                weight.square().sum().backward()
                with torch.no_grad():
                    weight.sub_(weight.grad, alpha=0.1)
        """)
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "3 backward passes" in done.stderr
    assert "step() of the wrapped SGD was not called" in done.stderr


def accumulating(model, optimizer):
    for number in range(130):
        loss_of(model, number).backward()
    optimizer.step()


def never_used(model, optimizer):
    del optimizer
    with torch.no_grad():
        for number in range(130):
            loss_of(model, number)


def stepping(model, optimizer):
    for number in range(130):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()


@pytest.mark.parametrize("loop", [accumulating, never_used, stepping])
def test_a_loop_that_has_nothing_wrong_is_told_nothing(loop, caplog):
    """Gradients that are accumulated over 130 batches are no 130 steps."""
    model = mlp()
    optimizer = sgd(model)
    agent, _ = watched(optimizer)
    loop(model, optimizer)
    agent.close()
    assert not caplog.text


def test_nothing_of_the_watch_is_left_after_the_first_step():
    """Neither a hook on a parameter nor a `zero_grad` on the optimizer, and no reference to it."""
    model = mlp()
    optimizer = sgd(model)
    watched(optimizer)
    assert "zero_grad" in vars(optimizer)
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    assert "zero_grad" not in vars(optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    gc.collect()


def test_a_model_that_waits_for_its_first_step_copies_and_pickles():
    """The hooks stay behind."""
    import copy
    import pickle

    model = mlp()
    optimizer = sgd(model)
    watched(optimizer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(p._post_accumulate_grad_hooks for p in other.parameters())
        loss_of(other, 0).backward()
    assert "zero_grad" not in vars(copy.deepcopy(optimizer))
    assert "zero_grad" not in vars(pickle.loads(pickle.dumps(optimizer)))


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_takes_no_step_of_its_own_is_refused():
    """LOMO applies each gradient within the backward pass."""
    zoo = pytest.importorskip("zoo")
    for name in ("po.lomo", "po.adalomo"):
        optimizer = zoo.OPTIMIZERS[name](zoo.model())
        with pytest.raises(ConfigurationError, match=r"fused_backward\(\) and takes no step"):
            gradwatch.wrap(optimizer)


@pytest.mark.parametrize("name", ["around.Lookahead", "around.TRAC", "around.OrthoGrad",
                                  "around.ScheduleFreeWrapper", "SAM"])  # fmt: skip
def test_an_outer_optimizer_that_steps_the_wrapped_one_is_told(name, caplog):
    """Once, by its class, with what to wrap instead; and not where that is wrapped."""
    loop = zoo.Loop({**zoo.OPTIMIZERS, **zoo.TWO_PASS}[name])
    outer = loop.optimizer
    inner = next(o for o in vars(outer).values() if isinstance(o, torch.optim.Optimizer))
    how = loop.step_after_backward if name == "SAM" else loop.step
    agent, _ = watched(inner)
    how(0)
    how(1)
    agent.close()
    told = [r.getMessage() for r in caplog.records if "Wrap the" in r.getMessage()]
    assert len(told) == 1
    assert f"Wrap the {type(outer).__name__} instead" in told[0]
    caplog.clear()
    agent, _ = watched(outer)
    how(2)
    agent.close()
    assert not caplog.records


def test_a_front_that_steps_the_wrapped_one_is_not_told_of(caplog):
    """The one of accelerate passes the call on, and does nothing else."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    agent, sink = watched(optimizer)
    set_gradients(0, model)
    prepared.step()
    assert agent.flush()
    assert len(sink.steps) == 1
    assert not caplog.records
