"""Whatever the values, NaN and infinities included, what is stored comes back."""

import dataclasses
import json
import math
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradwatch import events, testing
from gradwatch.config import redact
from gradwatch.recorder import STEP_DTYPE, Ring
from gradwatch.records import Batch, Event, LayerNorms
from gradwatch.sinks import rows
from gradwatch.sinks.database import DatabaseSink

floats = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
steps = st.tuples(
    st.integers(0, 2**62), *([floats] * 8), st.integers(0, 63)
)  # step, time, monotonic, loss, lr, pre, post, threshold, loss_scale, flags
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(steps, min_size=1, max_size=30))
def test_steps_through_a_ring(records):
    """Every field of every record, bit for bit."""
    ring = Ring.in_memory({}, steps=64, events=64)
    for record in records:
        ring.append(*record)
    read = ring.read_steps(0)
    ring.close()
    assert read.torn == read.overwritten == 0
    names = [n for n in STEP_DTYPE.names if n not in {"seq", "seq_end", "reserved"}]
    for row, record in zip(read.records, records, strict=True):
        np.testing.assert_equal([row[name].item() for name in names], list(record))


@given(st.lists(st.binary(max_size=1500), max_size=15))
def test_messages_through_a_ring(payloads):
    """Every message that still fits, whole and in order."""
    ring = Ring.in_memory({}, steps=64, events=64)
    for payload in payloads:
        ring.append_event(payload)
    read = ring.read_events(0).payloads
    ring.close()
    assert read == payloads[len(payloads) - len(read) :]
    slots = sum(max(1, math.ceil(len(p) / 480)) for p in payloads)
    assert slots > 64 or read == payloads


made_events = st.builds(
    Event,
    kind=texts,
    step=st.integers(0, 2**53),
    time=st.floats(0, 1e10),
    severity=st.sampled_from(["info", "warning", "critical"]),
    message=texts,
    data=st.dictionaries(texts, json_values, max_size=4),
    rank=st.none() | st.integers(0, 1000),
)


@given(made_events)
def test_events_as_messages(event):
    """As the ring keeps them."""
    decoded = events.decode(events.encode_event(event))
    np.testing.assert_equal(dataclasses.asdict(decoded), dataclasses.asdict(event))


@given(
    st.lists(st.tuples(texts, floats, floats), max_size=200), st.integers(0, 2**53), st.booleans()
)
def test_layer_norms_as_messages(layers, step, with_weights):
    """Gradient and weight norms by position; the names are told beside them."""
    names, grads, weights = ([row[i] for row in layers] for i in range(3))
    message = events.encode_layers(step, grads, weights if with_weights else None)
    decoded = events.decode(message, names)
    assert isinstance(decoded, LayerNorms)
    expected = weights if with_weights else [math.nan] * len(names)
    np.testing.assert_equal(
        [decoded.step, decoded.parameters, decoded.grad_norms, decoded.weight_norms],
        [step, names, grads, expected],
    )
    unnamed = events.decode(message, names[:1])
    assert unnamed.parameters[1:] == [f"parameter{i}" for i in range(1, len(names))]


@given(st.binary(max_size=60))
def test_foreign_messages_are_none(payload):
    """Garbage is not an event, and raises nothing."""
    decoded = events.decode(payload)
    assert decoded is None or isinstance(decoded, (Event, LayerNorms))


@given(json_values)
def test_strict_json_is_what_the_standard_says(value):
    """Non-finite numbers become null; all else comes back."""

    def refuse(name):
        raise AssertionError(name)

    def nulled(item):
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, list):
            return [nulled(i) for i in item]
        if isinstance(item, dict):
            return {k: nulled(v) for k, v in item.items()}
        return item

    assert json.loads(rows.strict_json(value), parse_constant=refuse) == nulled(value)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(steps, min_size=1, max_size=20, unique_by=lambda s: s[0]),
    st.lists(made_events, max_size=3),
)
def test_records_through_the_database(records, some_events):
    """Finite numbers as they were, others as NULL; flags; events with their data."""
    ring = Ring.in_memory({}, steps=64, events=64)
    for record in records:
        ring.append(record[0], 1.0, *record[2:])
    batch = Batch(ring.read_steps(0).records, some_events, (), (), (0, 0), (len(records), 1), {})
    ring.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        sink = DatabaseSink(f"sqlite:///{path}")
        run = sink.open(testing.run_info())
        sink.write(run, batch)
        sink.close(run, "finished")
        with sqlite3.connect(path) as connection:
            stored = connection.execute(
                "SELECT step, loss, lr, pre_norm, post_norm, threshold, loss_scale, clipped, "
                "nonfinite, nonfinite_loss, skipped FROM steps ORDER BY step"
            ).fetchall()
            kept = connection.execute("SELECT kind, step, message FROM events").fetchall()
        connection.close()
    expected = [
        (step, *(v if math.isfinite(v) else None for v in numbers),
         *(int(bool(flags & bit)) for bit in (1, 2, 4, 8)))
        for step, _, _, *numbers, flags in sorted(records)
    ]  # fmt: skip
    assert stored == expected
    assert kept == [(e.kind, e.step, e.message) for e in some_events]


secrets = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=12)


@given(
    secrets,
    st.sampled_from(
        [
            "postgresql+psycopg://user:{}@host/db",
            "postgresql://host/db?user=me&password={}",
            "postgresql://user:{}@host:99999x/db",
            "postgresql://user:other@host/db?sslpassword={}&passfile=x",
            "host=db user=me password={}",
        ],
    ),
)
def test_no_password_survives_redaction(secret, form):
    """In whatever form it stands in the URL, well-formed or not."""
    assume(secret not in form)
    assert secret not in redact(form.format(secret))
