"""What real jobs do to an optimizer: interruptions, subclasses, resumes, odd arguments, compilers."""

import gc
import json
import math
import sqlite3
import subprocess
import sys
import threading

import pytest
import torch
from loops import mlp, set_gradients

import gradwatch
from gradwatch import process
from gradwatch.policies import ClipNorm, TargetRatio
from gradwatch.testing import MemorySink


def watched(optimizer, **arguments):
    sink = MemorySink()
    arguments = {"store": sink, "metrics_port": None, **arguments}
    return gradwatch.Agent(optimizer, **arguments), sink


def one_parameter(kind=torch.optim.SGD, size=4, **arguments):
    weight = torch.nn.Parameter(torch.ones(size))
    return weight, kind([weight], **{"lr": 0.1, **arguments})


@pytest.mark.parametrize("how", ["close", "replace", "load_state_dict", "go on"])
def test_an_interrupted_step_leaves_nothing_on_the_optimizer(how, monkeypatch):
    """Ctrl-C inside a folded step, then what people do next: the divisor is gone."""
    weight, optimizer = one_parameter(fused=True)
    agent, _ = watched(optimizer)
    weight.grad = torch.full((4,), 50.0)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.sgd"], "sgd", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert optimizer.grad_scale is not None
    if how == "close":
        agent.close()
    elif how == "replace":
        agent, _ = watched(optimizer, replace=True)
    elif how == "load_state_dict":
        agent.load_state_dict(agent.state_dict())
    for _ in range(2):
        weight.grad = torch.full((4,), 0.05)
        before = weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - weight.detach(), torch.full((4,), 0.005))
        if how != "close":
            assert agent.last.pre_norm == pytest.approx(0.1)
    assert getattr(optimizer, "grad_scale", None) is None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_checkpoint_may_unfuse_the_optimizer(kind):
    """`load_state_dict` brings `fused=None` back: clipping goes on in place."""
    _, plain = one_parameter(kind)
    weight, optimizer = one_parameter(kind, fused=True)
    agent, _ = watched(optimizer)
    optimizer.load_state_dict(plain.state_dict())
    weight.grad = torch.full((4,), 50.0)
    optimizer.step()
    assert agent.last.clipped
    assert weight.grad.norm().item() == pytest.approx(1.0)


def test_a_subclass_that_calls_super_is_one_step():
    """Hooks that torch runs at both levels look once; a NaN step is whole to the subclass's end."""

    class Decaying(torch.optim.AdamW):
        seen = ()

        def step(self, closure=None):
            loss = super().step(closure)
            self.seen = [p.grad for g in self.param_groups for p in g["params"]]
            return loss

    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # torch wraps AdamW.step now as well
    weight, optimizer = one_parameter(Decaying)
    agent, sink = watched(optimizer)
    for value in (50.0, math.nan, 50.0):
        weight.grad = torch.full((4,), value)
        optimizer.step()
        assert optimizer.seen == [None] if math.isnan(value) else optimizer.seen[0] is weight.grad
        assert weight.grad is not None
    weight.grad = None
    optimizer.step((50 * weight.sum()).backward)
    assert agent.flush()
    assert [(s.step, s.clipped, s.skipped) for s in sink.steps] == [
        (0, True, False),
        (1, False, True),
        (2, True, False),
        (3, True, False),
    ]
    assert sink.steps[0].pre_norm == pytest.approx(100.0)
    assert [e.kind for e in sink.events] == ["nonfinite_gradient"]


def test_an_argument_of_step_that_is_no_closure_is_left_alone():
    """As some optimizers have it."""

    class Scaled(torch.optim.SGD):
        def step(self, scale=1.0):
            self.scale = scale

    weight, optimizer = one_parameter(Scaled)
    watched(optimizer)
    weight.grad = torch.ones(4)
    optimizer.step(0.5)
    assert optimizer.scale == 0.5


@pytest.mark.parametrize("result", [{"loss": 1}, (1, 2), torch.ones(3), "text", None])
def test_a_closure_may_return_anything(result):
    """What is not one number is no loss; records go on."""
    weight, optimizer = one_parameter()
    agent, sink = watched(optimizer)

    def closure():
        weight.grad = torch.ones(4)
        return result

    for _ in range(3):
        assert optimizer.step(closure) is result
    assert agent.flush()
    assert [(s.step, math.isnan(s.loss)) for s in sink.steps] == [(i, True) for i in range(3)]


def test_an_optimizer_without_a_learning_rate_is_recorded():
    """Its lr is absent (an optimizer that finds its own)."""
    weight, optimizer = one_parameter()
    agent, sink = watched(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    for lr in (0.1, torch.tensor(0.2)):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.ones(4)
        optimizer.step()

    class OwnPace(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": None})

        def step(self):
            return None

    other = OwnPace([torch.nn.Parameter(torch.ones(1))])
    paced, paced_sink = watched(other)
    other.step()
    assert agent.flush()
    assert paced.flush()
    assert [s.lr for s in sink.steps] == pytest.approx([0.1, 0.2])
    assert math.isnan(paced_sink.steps[0].lr)


def test_groups_added_later_get_the_last_policy(caplog):
    """Measured, clipped, and their NaN seen; said once."""
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=0.1)
    agent, sink = watched(optimizer, clip=[ClipNorm(1.0)])
    optimizer.add_param_group({"params": [second]})
    for value in (3.0, 3.0, math.nan):
        first.grad, second.grad = torch.full((2,), 4.0), torch.full((2,), value)
        optimizer.step()
        if not math.isnan(value):
            assert second.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert agent.flush()
    assert [s.pre_norm for s in sink.steps[:2]] == pytest.approx([math.sqrt(50)] * 2)
    assert sink.steps[2].nonfinite
    assert torch.isfinite(second).all()
    assert caplog.text.count("parameter group was added") == 1


def test_clip_twice_in_a_step_and_after_close():
    """The norm is the one before clipping both times; a closed agent goes on clipping."""
    weight, optimizer = one_parameter()
    agent, sink = watched(optimizer)
    weight.grad = torch.full((4,), 50.0)
    assert [float(agent.clip()), float(agent.clip())] == [100.0, 100.0]
    optimizer.step()
    agent.close()
    assert [s.pre_norm for s in sink.steps] == [100.0]
    for _ in range(2):
        weight.grad = torch.full((4,), 50.0)
        assert float(agent.clip()) == 100.0
        assert weight.grad.norm().item() == pytest.approx(1.0)
        optimizer.step()


def test_clip_before_the_scaler_has_scaled_anything():
    """Nothing to unscale yet."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, scaler=torch.amp.GradScaler("cpu"))
    weight.grad = torch.full((4,), 50.0)
    assert float(agent.clip()) == 100.0


def test_logged_losses_are_values_not_memory():
    """The loop may write into the tensor before the step."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer)
    loss = torch.tensor(3.0)
    agent.log(loss=loss)
    loss.zero_()
    weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.last.loss == 3.0


def test_a_model_that_changes_its_dtype_is_measured_right():
    """`model.bfloat16()` between two steps, against float64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    agent, _ = watched(optimizer, clip=gradwatch.ObserveOnly())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        optimizer.zero_grad()
        model(torch.randn(8, 64, dtype=dtype)).pow(2).mean().backward()
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
        optimizer.step()
        assert agent.last.pre_norm == pytest.approx(norm, rel=1e-5)


def test_a_finite_float64_gradient_is_clipped_however_large():
    """Squares that overflow float64, too."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    agent, _ = watched(optimizer)
    weight.grad = torch.tensor([3e200, 4e200], dtype=torch.float64)
    optimizer.step()
    assert agent.last.pre_norm == pytest.approx(5e200)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8], dtype=torch.float64))


@pytest.mark.parametrize("clip", [ClipNorm(1.0, math.inf), gradwatch.ClipValue(0.5)], ids=str)
def test_a_parameter_without_elements_is_no_trouble(clip):
    """As empty embeddings and uneven shards have it."""
    weight, empty = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(0))
    optimizer = torch.optim.SGD([weight, empty], lr=0.1)
    agent, _ = watched(optimizer, clip=clip)
    weight.grad, empty.grad = torch.full((2,), 7.0), torch.ones(0)
    optimizer.step()
    assert agent.last.clipped


def test_many_parameters_and_a_small_event_ring(monkeypatch, caplog):
    """Events that do not fit are lost alone: every step is on record once."""
    monkeypatch.setenv("GRADWATCH_RING_EVENTS", "64")
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2000)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    agent, sink = watched(optimizer)
    for step in range(3):
        for p in parameters:
            p.grad = torch.full((1,), math.nan if step == 1 else 1.0)
        optimizer.step()
    assert agent.flush()
    assert [s.step for s in sink.steps] == [0, 1, 2]
    assert "an event is not on record" in caplog.text


def test_a_nan_in_every_parameter_of_a_huge_model_is_on_record():
    """The event keeps both ends of the list and says how many it left out."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(9000)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    agent, sink = watched(optimizer)
    for i, p in enumerate(parameters):
        p.grad = torch.full((1,), math.nan if i else 1.0)
    optimizer.step()
    assert agent.flush(20)
    (event,) = sink.events
    assert event.data["origin"] == "group0.param8999"
    assert event.data["parameters_left_out"] == 8999 - len(event.data["parameters"])
    assert list(event.data["parameters"])[-1] == "group0.param8999"
    assert sum(len(sample.parameters) for sample in sink.layers) == 9000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaler": "x"}, "GradScaler"),
        ({"model": {"a": 1}}, "nn.Module"),
        ({"tags": (circular := {})}, "tags"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_begins(arguments, message):
    """Each error says what would be right."""
    circular["self"] = circular
    _, optimizer = one_parameter()
    with pytest.raises(gradwatch.ConfigurationError, match=message):
        gradwatch.wrap(optimizer, **arguments)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_policy_state_that_is_none_is_refused():
    """As all of a state that `state_dict` did not write."""
    _, optimizer = one_parameter()
    agent, _ = watched(optimizer, clip=TargetRatio())
    state = agent.state_dict()
    state["policies"][0]["state"] = {"threshold": "x"}
    with pytest.raises(gradwatch.ConfigurationError, match="policy"):
        agent.load_state_dict(state)


def test_tags_may_hold_what_json_cannot():
    """Shown as text."""
    weight, optimizer = one_parameter()
    agent, sink = watched(optimizer, tags={"grid": {(1, 2): 3}, "lock": threading.Lock(), 5: 6})
    weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.flush()
    tags = sink.runs[0].tags
    assert tags["grid"] == {"(1, 2)": 3}
    assert tags["lock"].startswith("<unlocked")
    assert tags["5"] == 6


# -- the worker ----------------------------------------------------------------------------------


def test_the_garbage_collector_may_end_a_run_anywhere(monkeypatch):
    """Inside the lock of the very event that wakes the worker: it takes no lock, so none can hang."""
    weight, optimizer = one_parameter()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # a reference cycle
    agent, sink = watched(optimizer)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.flush()
    pipeline = process.pipeline()
    done = threading.Event()

    def collect():
        # What the collector does in the middle of Event.set, whose lock is not reentrant.
        with pipeline._wake._cond:
            gc.collect()
        done.set()

    del weight, optimizer, scheduler
    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(20), "the finalizer waits for a lock that its own thread holds"
    channel = agent._channel
    assert channel.closed.wait(20)
    assert sink.statuses == ["finished"]
    assert agent.flush()


def test_closed_agents_are_not_kept():
    """Nor what they hold."""
    import weakref

    _, optimizer = one_parameter()
    gone = []
    for _ in range(3):
        agent, _ = watched(optimizer, replace=True)
        gone.append(weakref.ref(agent))
    del agent
    gradwatch.Agent.of(optimizer).close()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def steps_in(path):
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT count(*) FROM steps").fetchone()[0]


@pytest.mark.parametrize("fork", [False, True])
def test_a_store_that_is_deleted_is_made_anew(tmp_path, fork, caplog):
    """With all that the flight recorder holds; `flush` tells the truth."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, store="runs.db")
    for half in range(2):
        for _ in range(5):
            weight.grad = torch.ones(4)
            optimizer.step()
        assert agent.flush()
        if half == 0:
            for file in tmp_path.glob("runs.db*"):
                if file.is_file():
                    file.unlink()
            if fork:
                process.pipeline().before_fork()
                process.pipeline().after_fork()
    agent.close()
    assert steps_in("runs.db") == 10
    assert caplog.text.count("deleted or emptied") == 1
    assert not list(tmp_path.glob("*.rings/*.ring"))


def test_a_locked_store_is_one_warning_and_the_end_is_on_record(caplog):
    """Another writer holds the lock for two seconds while the run goes on and ends."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, store="runs.db")
    weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.flush()
    locked, release = threading.Event(), threading.Event()

    def lock():
        connection = sqlite3.connect("runs.db", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        locked.set()
        release.wait(2.0)
        connection.execute("ROLLBACK")
        connection.close()

    holder = threading.Thread(target=lock)
    holder.start()
    assert locked.wait(10)
    for _ in range(20):
        weight.grad = torch.ones(4)
        optimizer.step()
    agent.close()
    release.set()
    holder.join()
    assert steps_in("runs.db") == 21
    with sqlite3.connect("runs.db") as connection:
        status, ended = connection.execute("SELECT status, ended_at FROM runs").fetchone()
    assert status == "finished"
    assert ended is not None
    assert caplog.text.count("database is locked") <= 1


def test_a_sink_that_raises_anything_stops_no_other():
    """A user's own sink with a bug: said once; the exporter has the steps."""

    class Broken(MemorySink):
        def write(self, run, batch):
            raise TypeError("a bug")

    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, store=Broken(), metrics_port=0)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert not agent.flush(0.5)
    import urllib.request

    text = urllib.request.urlopen(agent.metrics_url).read().decode()
    assert 'gradwatch_steps_total{rank="0",run="' in text
    agent.close()


def test_two_scripts_of_one_allocation_are_two_runs(tmp_path):
    """Both alive under one Slurm job id: neither hides the other's steps."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, torch, gradwatch\n"
        "w = torch.nn.Parameter(torch.ones(2)); o = torch.optim.SGD([w], lr=.1)\n"
        "a = gradwatch.Agent(o, run=sys.argv[1], store='runs.db', metrics_port=None)\n"
        "for i in range(40):\n"
        "    w.grad = torch.ones(2); o.step()\n"
        "assert a.flush(20)\n"
        "print('stored', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    import os

    jobs = []
    for name in ("resnet", "lstm"):
        job = subprocess.Popen(
            [sys.executable, str(script), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "77"},
        )
        jobs.append(job)
        assert job.stdout.readline() == "stored\n"
    for job in jobs:
        job.communicate("\n", timeout=60)
        assert job.returncode == 0
    with sqlite3.connect("runs.db") as connection:
        found = connection.execute(
            "SELECT r.name, count(*) FROM runs r JOIN steps s ON s.run_id = r.id GROUP BY r.id"
        ).fetchall()
    assert found == [("resnet", 40), ("lstm", 40)]


def test_a_script_whose_name_is_no_text(tmp_path):
    """Its run is stored, under a name that is."""
    script = tmp_path / b"tr\xe9n.py".decode("utf-8", "surrogateescape")
    script.write_text(
        "import torch, gradwatch\n"
        "w = torch.nn.Parameter(torch.ones(2)); o = torch.optim.SGD([w], lr=.1)\n"
        "gradwatch.wrap(o, store='runs.db', metrics_port=None)\n"
        "w.grad = torch.ones(2); o.step()\n"
    )
    subprocess.run([sys.executable, script], check=True, timeout=120)
    with sqlite3.connect("runs.db") as connection:
        assert connection.execute("SELECT name, status FROM runs").fetchall() == [
            ("tr?n", "finished")
        ]


# -- torch.compile -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_compiled_step_works_and_does_not_recompile(with_closure):
    """Same parameters as the plain step; no new graph after the first steps."""
    from torch._dynamo.utils import counters

    model, twin = mlp(), mlp()
    ours = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, foreach=True)
    agent, sink = watched(ours)
    step = torch.compile(ours.step, backend="eager")
    graphs = []
    for i in range(8):
        set_gradients(i, model, twin)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        theirs.step()
        if with_closure:
            step(lambda: torch.tensor(2.0))
        else:
            step()
        assert agent.last.pre_norm == pytest.approx(float(norm), rel=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[-1] == graphs[2]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert agent.flush()
    assert len(sink.steps) == 8


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_watched():
    """The names are those of its parameters."""
    model = torch.compile(mlp(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent, sink = watched(optimizer, model=model)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).sum() * (math.nan if step == 2 else 1.0)
        loss.backward()
        optimizer.step()
    torch._dynamo.reset()
    assert agent.flush()
    assert [s.nonfinite for s in sink.steps] == [False, False, True]
    (event,) = [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert any(name.endswith("0.weight") for name in event.data["parameters"])
    json.dumps(event.data)
