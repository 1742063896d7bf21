"""Arguments and settings: which comes first, and errors that say what is right."""

import math
import threading

import pytest
import torch
from loops import mlp, one_parameter, sgd, step_once, watched

import gradwatch
from gradwatch import Agent, ClipNorm, ClipValue, Settings
from gradwatch.sinks.register import LIVE_SECONDS
from gradwatch.testing import MemorySink


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "much", None, True])
@pytest.mark.parametrize("policy", [ClipNorm, ClipValue])
def test_a_threshold_is_a_finite_number_above_zero(policy, value):
    """Negative would reverse the gradients, zero stop the training, NaN poison it."""
    name = "max_norm" if policy is ClipNorm else "clip_value"
    with pytest.raises(gradwatch.ConfigurationError, match=name) as caught:
        policy(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clip": 1.0}, "ClipNorm"),
        ({"clip": []}, "ClipNorm"),
        ({"clip": [ClipNorm(1.0), ClipNorm(1.0)]}, "2 policies.*1 parameter group"),
        ({"on_nonfinite": "stop"}, '"skip", "raise" or "ignore"'),
        ({"metrics_port": 70000}, "70000.*0 to 65535"),
        ({"metrics_port": "abc"}, "abc.*0 to 65535"),
        ({"store": "mysql://root:secret@db/x"}, "SQLite or PostgreSQL"),
        ({"store": "host=db user=me password=secret"}, "a connection string of PostgreSQL's own"),
        ({"store": 3}, "URL"),
        ({"run": ""}, "run"),
        ({"run": "x" * 241}, "run.*240 characters"),
        ({"run": "a\0b"}, "run.*NUL"),
        ({"run": "a\udc80"}, "run.*unicode"),
        ({"tags": ["a"]}, "dict"),
        ({"settings": {"run": "x"}}, "gradwatch.Settings"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    """The error names the argument, its value and what would be right; nothing is hooked."""
    optimizer = sgd()
    with pytest.raises(gradwatch.ConfigurationError, match=words) as caught:
        gradwatch.wrap(optimizer, **{"store": MemorySink(), "metrics_port": None} | arguments)
    assert "secret" not in str(caught.value)
    assert not optimizer._optimizer_step_pre_hooks


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


def test_only_optimizers_are_wrapped():
    """A model handed over by mistake is told apart."""
    with pytest.raises(gradwatch.ConfigurationError, match="torch.optim.Optimizer, not Sequential"):
        gradwatch.wrap(mlp())


def test_lbfgs_cannot_skip():
    """Refused at `wrap`, with what to use."""
    with pytest.raises(gradwatch.ConfigurationError, match='"raise" or "ignore"'):
        gradwatch.wrap(torch.optim.LBFGS(mlp().parameters()))


def test_mixed_norm_types_are_refused():
    """A total of an L2 and an L1 norm means nothing."""
    model = mlp()
    groups = [{"params": list(m.parameters())} for m in (model[0], model[2])]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(gradwatch.ConfigurationError, match="norm_type"):
        gradwatch.wrap(optimizer, clip=[ClipNorm(1.0), ClipNorm(1.0, norm_type=1)])


def test_settings_come_after_arguments_and_before_the_environment(monkeypatch):
    """Argument, Settings, environment, default: in this order."""
    monkeypatch.setenv("GRADWATCH_RUN", "from-environment")
    monkeypatch.setenv("GRADWATCH_RING_STEPS", "128")
    for arguments, expected in (
        ({"run": "argument", "settings": Settings(run="settings")}, "argument"),
        ({"settings": Settings(run="settings")}, "settings"),
        ({}, "from-environment"),
    ):
        optimizer = sgd()
        agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None, **arguments)
        step_once(optimizer)
        assert agent.flush()
        assert sink.runs[0].name == expected
        assert agent._recording.channel.ring.step_capacity == 128


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


def test_a_heartbeat_is_never_rarer_than_a_run_may_be_silent():
    """Else a live run would be taken for gone, and pruned."""
    longest = Settings.load(heartbeat_interval=30).heartbeat_interval
    assert longest <= LIVE_SECONDS / 2
    with pytest.raises(gradwatch.ConfigurationError, match=r"heartbeat_interval.*30"):
        Settings.load(heartbeat_interval=30.1)


def test_a_setting_that_was_mistyped_is_said_once(monkeypatch, caplog):
    """In the job itself: nobody asks `gradwatch doctor` there."""
    monkeypatch.setenv("GRADWATCH_STOER", "sqlite:///secret.db")
    for _ in range(2):
        gradwatch.wrap(sgd(), store=MemorySink(), metrics_port=None)
    (message,) = [message for message in caplog.messages if "STOER" in message]
    assert "GRADWATCH_STOER is no setting and does nothing" in message
    assert "secret" not in message
