"""Fixtures of the agent's tests."""

import sys

import pytest
from devices import Queue
from loops import one_parameter

from gradwatch import deferred, kernels


@pytest.fixture
def queue(monkeypatch):
    """The CPU as a device that steps are deferred to."""
    queue = Queue()
    monkeypatch.setattr(deferred, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(deferred, "arrival", queue.arrival)
    return queue


@pytest.fixture
def by_torch(monkeypatch):
    """The steps that torch's own Python takes, one entry a group."""
    taken = []
    for module, function in (("adam", "adam"), ("sgd", "sgd")):
        place = sys.modules[f"torch.optim.{module}"]
        original = getattr(place, function)

        def counted(*args, original=original, **kwargs):
            taken.append(original)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, function, counted)
    for kind in kernels._CALLS:
        kernels.KernelStep.of(one_parameter(kind)[1], None, None)  # tries torch's own, once
    taken.clear()
    return taken
