"""torch.compile, of the step and of the model."""

import json
import math

import pytest
import torch
from loops import mlp, set_gradients, watched


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_a_compiled_step_works_and_does_not_recompile(with_closure, kernel):
    """Same parameters as the plain step; no new graph after the first steps."""
    from torch._dynamo.utils import counters

    model, twin = mlp(), mlp()
    ours = torch.optim.AdamW(model.parameters(), lr=0.01, **{kernel: True})
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, **{kernel: True})
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
