"""`wrap([…])`: several optimizers are one run, with the norm over all of their gradients."""

import copy
import math
import pickle
import re
import sqlite3
from pathlib import Path

import pytest
import torch
import zoo
from loops import greatest_difference, watched
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, get_total_norm

import gradwatch
from gradwatch import Agent, ClipNorm, NotWrappedError
from gradwatch.errors import AlreadyWrappedError, ConfigurationError
from gradwatch.recorder import FLAGS

LAYERS = 40


def deep(layers=LAYERS):
    """A network of so many layers, the same each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(layers)])


def one_a_layer(net):
    return [torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9) for layer in net]


def step_in_backward(net, optimizers):
    """Each optimizer steps as soon as its gradients are there, and frees them."""
    for layer, optimizer in zip(net, optimizers, strict=True):
        waiting = set(layer.parameters())

        def ready(param, optimizer=optimizer, layer=layer, waiting=waiting):
            waiting.discard(param)
            if not waiting:
                optimizer.step()
                optimizer.zero_grad()
                waiting.update(layer.parameters())

        for param in layer.parameters():
            param.register_post_accumulate_grad_hook(ready)


def loss_of(net, number, *, nan=False):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 8, generator=generator)
    loss = 100 * (net(x) - x).square().mean()
    return loss * math.nan if nan else loss


def clipped_a_layer(net, steps, limit):
    """Torch alone: each layer clipped by itself; the norm of all gradients at each step."""
    optimizers, norms = one_a_layer(net), []
    for number in range(steps):
        net.zero_grad()
        loss_of(net, number).backward()
        norms.append(float(get_total_norm([p.grad for p in net.parameters()])))
        for layer, optimizer in zip(net, optimizers, strict=True):
            clip_grad_norm_(layer.parameters(), limit)
            optimizer.step()
    return norms


def test_optimizers_in_the_backward_pass_are_one_run():
    """One record a step, with the global norm; each layer is clipped by its own."""
    ours, theirs = deep(), deep()
    optimizers = one_a_layer(ours)
    agent, sink = watched(optimizers, model=ours, clip=ClipNorm(0.05))
    step_in_backward(ours, optimizers)
    norms = clipped_a_layer(theirs, 12, 0.05)
    for number in range(12):
        loss = loss_of(ours, number)
        agent.log(loss=loss)
        loss.backward()
        assert agent.last.step == number
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert len({run.uid for run in sink.runs}) == 1
    assert [record.step for record in sink.steps] == list(range(12))
    assert [record.pre_norm for record in sink.steps] == pytest.approx(norms, rel=1e-5)
    assert all(record.post_norm <= 0.05 * LAYERS**0.5 * (1 + 1e-6) for record in sink.steps)
    assert all(record.clipped for record in sink.steps)
    assert all(math.isnan(record.threshold) for record in sink.steps)
    assert not any(math.isnan(record.loss) for record in sink.steps)


def test_a_nan_in_one_of_them_is_on_record_and_only_that_one_is_left_out():
    """The others have stepped already, or will: the record says that the step has a NaN."""
    net = deep(3)
    optimizers = one_a_layer(net)
    agent, sink = watched(optimizers, model=net, clip=ClipNorm(1e6))
    for number in range(3):
        net.zero_grad()
        loss_of(net, number).backward()
        if number == 1:
            with torch.no_grad():
                net[1].weight.grad[0, 0] = math.nan
            before = [zoo.comparable(list(layer.parameters())) for layer in net]
        for optimizer in optimizers:
            optimizer.step()
        if number == 1:
            after = [zoo.comparable(list(layer.parameters())) for layer in net]
            assert [a == b for a, b in zip(after, before, strict=True)] == [False, True, False]
    assert agent.flush()
    assert [(r.nonfinite, r.skipped) for r in sink.steps] == [
        (False, False), (True, True), (False, False)]  # fmt: skip
    assert math.isnan(sink.steps[1].pre_norm)
    (event,) = [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert event.step == 1
    assert list(event.data["parameters"]) == ["1.weight"]


class _Poison(torch.autograd.Function):
    """Finite forwards, NaN backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "in the backward pass"])
@pytest.mark.parametrize("behind", [None, 1, 3], ids=["loss", "layer 1", "layer 3"])
def test_a_nan_is_told_once_with_where_it_entered_the_model(behind, backwards, caplog):
    """No optimizer sees more than its layer: all of them together show where the NaN comes from."""
    net = deep(5)
    optimizers = one_a_layer(net)
    agent, sink = watched(optimizers, model=net, clip=ClipNorm(1e6))
    if backwards:
        step_in_backward(net, optimizers)
    for number in range(21):
        net.zero_grad()
        x = torch.ones(4, 8)
        for i, layer in enumerate(net):
            x = layer(x)
            if number and i == behind:
                x = _Poison.apply(x)
        (x.square().mean() * (math.nan if number and behind is None else 1.0)).backward()
        if not backwards:
            for optimizer in optimizers:
                optimizer.step()
    agent.close()
    assert [r.nonfinite for r in sink.steps] == [False] + [True] * 20
    told = [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert [e.step for e in told] == [1, 2, 4, 8, 16]
    spoilt = range(5 if behind is None else behind + 1)
    expected = [f"{i}.{name}" for i in spoilt for name in ("weight", "bias")]
    for event in told:
        assert list(event.data["parameters"]) == expected
        assert event.data["tensors"] == 10
        assert event.data["origin"] == (None if behind is None else expected[-1])
        assert event.data["entered"] == ("forward" if behind is None else "backward")
    whose = "" if behind is None else f"of {behind + 1} of 5 optimizers "
    assert f"; the step {whose}was skipped" in told[0].message
    assert caplog.text.count("NaN in the gradient") == 1
    assert told[0].message in caplog.text


def test_a_spike_and_a_zero_are_of_the_whole_gradient():
    """One event each, of the norm that is on record."""
    net = deep(3)
    optimizers = one_a_layer(net)
    agent, sink = watched(optimizers, model=net, clip=ClipNorm(1e6))
    for number in range(60):
        for i, param in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(100 * number + i)
            scale = {50: 100.0, 55: 0.0}.get(number, 1.0)
            param.grad = scale * torch.randn(param.shape, generator=generator)
            if number == 40 and i < 2:
                param.grad.zero_()  # one layer of three
        for optimizer in optimizers:
            optimizer.step()
    flags = agent._recording.channel.ring.read_steps(0, 60).records["flags"]
    assert (flags & FLAGS.NORM_SPIKE).nonzero()[0].tolist() == [50]  # what the exporter counts
    agent.close()
    assert [(e.kind, e.step) for e in sink.events] == [
        ("grad_norm_spike", 50),
        ("dead_gradient", 55),
    ]
    spike, zero = sink.events
    assert spike.data["norm"] == sink.steps[50].pre_norm
    assert zero.data["tensors"] == 6


def test_layers_are_named_and_measured_as_in_the_model():
    """A sample has every parameter of the model, from whichever optimizer."""
    net = deep(5)
    optimizers = one_a_layer(net)
    settings = gradwatch.Settings(layer_norms_every=1)
    agent, sink = watched(optimizers, model=net, clip=ClipNorm(1e6), settings=settings)
    step_in_backward(net, optimizers)
    twin = copy.deepcopy(deep(5))
    loss_of(net, 0).backward()
    loss_of(twin, 0).backward()
    agent.close()
    (sample,) = sink.layers
    assert sample.parameters == [name for name, _ in twin.named_parameters()]
    expected = [float(p.grad.norm()) for p in twin.parameters()]
    assert sample.grad_norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["", "scaler="])
def test_two_optimizers_of_one_model_under_a_scaler(given):
    """Muon for the matrices, AdamW for the rest; an overflow is one event of the step."""
    net = deep(4)
    matrices = [p for p in net.parameters() if p.ndim == 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, fused=True)]
    scaler = GradScaler("cpu", init_scale=2.0**10)
    agent, sink = watched(
        optimizers, model=net, clip=ClipNorm(1e6), **{"scaler": scaler} if given else {}
    )
    norms = []
    for number in range(6):
        net.zero_grad()
        scaler.scale(loss_of(net, number) * (1e38 if number == 3 else 1.0)).backward()
        norms.append(float(get_total_norm([p.grad for p in net.parameters()])) / scaler.get_scale())
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    agent.close()
    assert [record.step for record in sink.steps] == list(range(6))
    for record, norm in zip(sink.steps, norms, strict=True):
        assert record.skipped == (record.step == 3)
        if record.step != 3:
            assert record.pre_norm == pytest.approx(norm, rel=1e-5)
    assert [e.kind for e in sink.events if e.kind != "grad_norm_spike"] == ["amp_overflow"]


def test_one_that_steps_less_often_is_in_the_rounds_that_it_stepped_in():
    """Steps are counted by the one that steps most."""
    net = deep(2)
    first, second = optimizers = one_a_layer(net)
    agent, sink = watched(optimizers, model=net, clip=ClipNorm(1e6))
    expected = []
    for number in range(6):
        net.zero_grad()
        loss_of(net, number).backward()
        stepped = [first, second] if number % 3 == 2 else [first]
        params = [p for o in stepped for p in o.param_groups[0]["params"]]
        expected.append(float(get_total_norm([p.grad for p in params])))
        for optimizer in stepped:
            optimizer.step()
    agent.close()
    assert [record.step for record in sink.steps] == list(range(6))
    assert [record.pre_norm for record in sink.steps] == pytest.approx(expected, rel=1e-5)


def test_layers_that_are_not_used_in_a_step_are_no_part_of_its_norm():
    """As in a mixture of experts: others each time, in the order of the layers."""
    net = deep(6)
    optimizers = one_a_layer(net)
    agent, sink = watched(optimizers, model=net, clip=ClipNorm(1e6))
    step_in_backward(net, optimizers)
    expected = []
    used = [(0, 1, 2, 3, 4, 5), (0, 2, 5), (0, 1, 4), (1, 2, 3), (0, 5), (0, 1, 2, 3, 4, 5)]
    for number, layers in enumerate(used):
        twin = copy.deepcopy(torch.nn.Sequential(*[net[i] for i in layers]))
        for parameter in twin.parameters():
            parameter.grad = None
        loss_of(twin, number).backward()
        expected.append(float(get_total_norm([p.grad for p in twin.parameters()])))
        loss_of(torch.nn.Sequential(*[net[i] for i in layers]), number).backward()
    agent.close()
    assert [record.step for record in sink.steps] == list(range(len(used)))
    assert [record.pre_norm for record in sink.steps] == pytest.approx(expected, rel=1e-5)


def test_clip_by_hand_gives_the_norm_of_all():
    """`agent.clip()` clips each optimizer's gradients; the steps then do not do so again."""
    ours, theirs = deep(3), deep(3)
    optimizers = one_a_layer(ours)
    agent, sink = watched(optimizers, model=ours, clip=ClipNorm(0.05))
    norms = clipped_a_layer(theirs, 5, 0.05)
    for number in range(5):
        ours.zero_grad()
        loss_of(ours, number).backward()
        assert float(agent.clip()) == pytest.approx(norms[number], rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert greatest_difference(ours, theirs) < 1e-6
    agent.close()
    assert [record.pre_norm for record in sink.steps] == pytest.approx(norms, rel=1e-5)


def test_a_checkpoint_goes_on_as_the_same_run():
    """One state for the run, whichever optimizer it is asked through."""
    net = deep(2)
    optimizers = one_a_layer(net)
    agent, _ = watched(optimizers, model=net)
    for number in range(3):
        loss_of(net, number).backward()
        for optimizer in optimizers:
            optimizer.step()
    state = pickle.loads(pickle.dumps(Agent.of(optimizers[1]).state_dict()))
    assert Agent.of(optimizers) is Agent.of(optimizers[0]) is agent
    agent.close()
    again = deep(2)
    more = one_a_layer(again)
    resumed, sink = watched(more, model=again)
    resumed.load_state_dict(state)
    loss_of(again, 3).backward()
    for optimizer in more:
        optimizer.step()
    resumed.close()
    assert resumed.run_id == agent.run_id
    assert [record.step for record in sink.steps] == [3]


def test_the_run_ends_with_the_last_of_its_optimizers():
    """The others go on where one is gone."""
    net = deep(2)
    optimizers = one_a_layer(net)
    agent, sink = watched(optimizers, model=net)
    for optimizer in optimizers:
        loss_of(net, 0).backward()
        optimizer.step()
    del optimizer
    optimizers.pop()
    for number in range(2):
        loss_of(net, number).backward()
        optimizers[0].step()
    agent.close()
    assert [record.step for record in sink.steps] == [0, 1, 2]
    with pytest.raises(NotWrappedError):
        Agent.of(optimizers)


def test_what_is_no_list_of_optimizers_is_refused():
    """By what is wrong with it."""
    net = deep(2)
    first, second = one_a_layer(net)
    with pytest.raises(ConfigurationError, match="needs model"):
        gradwatch.wrap([first, second])
    with pytest.raises(ConfigurationError, match="twice"):
        gradwatch.wrap([first, first], model=net)
    with pytest.raises(ConfigurationError, match="at least one"):
        gradwatch.wrap([])
    with pytest.raises(ConfigurationError, match="Linear"):
        gradwatch.wrap([first, net[0]], model=net)
    watched(second)
    with pytest.raises(AlreadyWrappedError):
        watched([first, second], model=net)


def test_many_runs_of_one_process_take_little_space():
    """Wrapped one by one they are runs of their own; only the first have a ring of full size."""
    net = deep()
    optimizers = one_a_layer(net)
    agents = [Agent(o, metrics_port=None, store="many.db") for o in optimizers]
    loss_of(net, 0).backward()
    for optimizer in optimizers:
        optimizer.step()
    rings = [ring.stat().st_size for ring in Path("many.db.rings").glob("*.ring")]
    assert len(rings) == LAYERS
    assert sum(rings) < 150e6
    for agent in agents:
        agent.close()
    with sqlite3.connect("many.db") as store:
        assert store.execute("SELECT count(*) FROM runs").fetchone() == (LAYERS,)


def test_an_agent_copies_and_pickles_to_none():
    """A net or a callback that holds its agent can be saved and copied."""
    net = deep(2)
    net.agent, _ = watched(torch.optim.SGD(net.parameters(), lr=0.1))
    assert copy.deepcopy(net).agent is None
    assert copy.copy(net.agent) is None
    assert pickle.loads(pickle.dumps(net)).agent is None


def test_the_examples_of_the_page_run():
    """Those of docs/optimizers.md, with a model of their kind."""
    page = (Path(gradwatch.__file__).parents[2] / "docs" / "optimizers.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        model = deep(3)
        names = {
            "torch": torch,
            "gradwatch": gradwatch,
            "model": model,
            "matrices": [p for p in model.parameters() if p.ndim == 2],
            "others": [p for p in model.parameters() if p.ndim < 2],
        }
        exec(example, names)
        loss_of(model, 0).backward()
        for optimizer in names["optimizers"]:
            optimizer.step()
        agent = Agent.of(names["optimizers"])
        norm = float(get_total_norm([p.grad for p in model.parameters()]))
        assert agent.last.post_norm == pytest.approx(norm, rel=1e-4)
        agent.close()
