"""Flight recorders that were written over: `recover` answers, and stores what other jobs left."""

import dataclasses
import json
from pathlib import Path

import fuzzing
import numpy as np
import pytest
from fuzzing import DAMAGES, JSONS, check_answer, damage
from hypothesis import given
from hypothesis import strategies as st
from stores import records

from gradwatch.events import encode_event, encode_layers
from gradwatch.identity import host
from gradwatch.recorder import Ring
from gradwatch.records import Event
from gradwatch.testing import run_info

STEPS = 100
RINGS = Path("gradwatch.db.rings")
ABOUT = {
    **dataclasses.asdict(run_info(host=host(), pid=2**22 + 1)),  # a number that no process has
    "store": "sqlite:///gradwatch.db", "schema": 1, "parameters": ["a", "b"],
}  # fmt: skip


def leave(job, messages=(), about=()):
    """The flight recorder of a job that was killed after some steps."""
    names = dict.fromkeys(("uid", "name", "ring"), job)
    ring = Ring.create(
        RINGS / f"{job}.ring", {**ABOUT, **names, **dict(about)}, steps=128, events=64
    )
    for row in records(0, STEPS, odd=0):
        ring.append(*row.item()[1:10], int(row["flags"]))
    for message in messages:
        ring.append_event(message)
    ring.close()
    return ring.path


def check_recover(run, *whole):
    """It answers, and the steps of the jobs whose records are whole are all in the store."""
    status, out, err = run("recover")
    check_answer(["recover"], status, out, err)
    with fuzzing.connected("gradwatch.db") as connection:
        query = "SELECT uid, count(*) FROM steps JOIN runs ON id = run_id GROUP BY 1"
        stored = dict(connection.execute(query).fetchall())
    assert {uid: stored.get(uid) for uid in whole} == dict.fromkeys(whole, STEPS), (out, err)
    for verb in (("runs",), ("show", "uid:broken"), ("diagnose", "uid:broken"), ("recover",)):
        check_answer(verb, *run(*verb))


@pytest.fixture
def fresh(copy):
    """An empty store's folder, with the flight recorder of a job that is whole."""

    def empty():
        copy().unlink()
        leave("whole")

    return empty


def test_bytes_that_were_written_over(run, fresh, budget):
    """Header, metadata, records and messages."""
    places = st.integers(0, 4200) | st.integers(0, 2**31)

    @given(DAMAGES, st.lists(st.tuples(places, st.binary(min_size=1, max_size=8)), max_size=3))
    def check(damages, flips):
        fresh()
        path = leave("broken", [encode_event(Event("e", 1, 1.0, "info", "text" * 200))])
        for at, content in flips:
            damage(path, "flip", at, content)
        for damaged in damages if not flips else ():
            damage(path, *damaged)
        check_recover(run, "whole")

    budget.spend(0.06, check)


def test_metadata_and_messages_of_any_shape(run, fresh, budget):
    """JSON that says something else than what a job writes."""
    whole = json.loads(encode_event(Event("e", 1, 1.0, "info", "text", {"a": 1}, 0)))
    changed = st.builds(
        lambda name, value: {**whole, name: value}, st.sampled_from(sorted(whole)), JSONS
    )
    layers = encode_layers(3, [1.0, np.nan], [1.0, 2.0])
    messages = st.one_of(
        changed.map(lambda body: json.dumps(body).encode()),
        JSONS.map(lambda body: json.dumps(body).encode()),
        st.binary(max_size=60),
        st.builds(lambda at, byte: layers[:at] + byte + layers[at + 1 :], st.integers(0, 30), st.binary(max_size=2)),
    )  # fmt: skip

    @given(
        st.dictionaries(st.sampled_from(sorted(ABOUT)), JSONS, max_size=2),
        st.lists(messages, max_size=4),
    )
    def check(about, messages):
        fresh()
        leave("broken", messages, about)
        check_recover(run, "whole", *(() if about else ("broken",)))

    budget.spend(0.06, check)
