"""Fixtures of the agent's tests."""

import pytest
from devices import Queue

from gradwatch import deferred


@pytest.fixture
def queue(monkeypatch):
    """The CPU as a device that steps are deferred to."""
    queue = Queue()
    monkeypatch.setattr(deferred, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(deferred, "arrival", queue.arrival)
    return queue
