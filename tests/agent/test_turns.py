"""The interpreter's switch interval: short while the store is far behind, and only then."""

import os
import sys

import pytest

from gradwatch.channel import Channel
from gradwatch.delivery import Delivery
from gradwatch.recorder import Ring
from gradwatch.sinks import NullSink
from gradwatch.testing import ManualClock, run_info
from gradwatch.troubles import Troubles
from gradwatch.turns import BEHIND, Turns


class Looking(NullSink):
    """Notes the interval that holds while it stores."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def write(self, run, batch):
        self.seen.add(round(sys.getswitchinterval(), 6))
        super().write(run, batch)


@pytest.fixture(autouse=True)
def usual():
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.004)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(("waiting", "seen"), [(BEHIND, 0.004), (BEHIND + 1, 0.0001)])
def test_it_is_short_while_many_steps_wait_and_as_before_afterwards(tmp_path, waiting, seen):
    ring = Ring.create(tmp_path / "x.ring", {}, steps=2**14, events=16)
    for step in range(waiting):
        ring.append(step, 1e9, 0.0, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0, 0)
    store = Looking()
    channel = Channel(run_info(), ring, store, NullSink(), parameters=list)
    Delivery(ManualClock(), Troubles()).serve(channel)
    assert channel.store.stored == waiting
    assert store.seen == {seen}
    assert sys.getswitchinterval() == pytest.approx(0.004)


def test_what_somebody_else_has_set_stays():
    turns = Turns()
    sys.setswitchinterval(1e-5)  # shorter already
    with turns.short():
        assert sys.getswitchinterval() == pytest.approx(1e-5)
    assert sys.getswitchinterval() == pytest.approx(1e-5)
    sys.setswitchinterval(0.004)
    with turns.short():
        sys.setswitchinterval(0.02)
    assert sys.getswitchinterval() == pytest.approx(0.02)


def test_a_store_that_raises_leaves_it_as_it_was():
    with pytest.raises(ZeroDivisionError), Turns().short():
        1 / 0  # noqa: B018
    assert sys.getswitchinterval() == pytest.approx(0.004)


def test_a_forked_child_has_the_usual_one():
    """Forked while the worker of the parent has shortened it: nothing else would restore it."""
    turns = Turns()
    with turns.short():
        child = os.fork()
        if child == 0:
            turns.restore()
            os._exit(0 if abs(sys.getswitchinterval() - 0.004) < 1e-6 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
