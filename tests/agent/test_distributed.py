"""Several ranks (gloo, on this machine): norms are global, clipping is the same everywhere."""

import json
import sqlite3

import numpy as np
import pytest
import ranks


def query(sql):
    with sqlite3.connect("gradwatch.db") as connection:
        return connection.execute(sql).fetchall()


def check_against_torch(results, *, tolerance=1e-6):
    """Norms and parameters as torch's own clipping gives them; the same bits on every rank."""
    for result in results:
        np.testing.assert_allclose(result["norms"], result["expected"], rtol=1e-5)
        np.testing.assert_allclose(result["watched"], result["plain"], atol=tolerance, rtol=0)
        assert result["watched"] == results[0]["watched"]
        assert result["norms"] == results[0]["norms"]
        assert result["after_nan"] == result["watched"]
        assert result["skipped"]


@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel(tmp_path, world):
    """DDP with accumulation: one run, one exporter, the rank whose loss was NaN is named."""
    results = ranks.run(ranks.data_parallel, world, tmp_path)
    check_against_torch(results)
    assert results[0]["url"]
    assert [r["url"] for r in results[1:]] == [None] * (world - 1)
    assert len({r["run"] for r in results}) == 1
    assert query("SELECT name, world_size, status FROM runs") == [("job", world, "finished")]
    assert query("SELECT count(*), min(step), max(step) FROM steps") == [(9, 0, 8)]
    assert query("SELECT rank, step, message FROM events WHERE kind = 'nonfinite_loss'") == [
        (world - 1, 8, f"rank {world - 1}: the loss is NaN")
    ]
    # After the all-reduce every rank holds the NaN: the gradient alone does not tell whose it was.
    assert query("SELECT rank, step FROM events WHERE kind = 'nonfinite_gradient'") == [(None, 8)]
    assert query("SELECT count(*), count(DISTINCT rank) FROM rings") == [(world, world)]
    assert not list(tmp_path.glob("*.rings/*.ring"))  # all was stored


@pytest.mark.parametrize("world", [2, 4])
def test_a_threshold_applied_live_is_taken_by_all_ranks_at_one_step(tmp_path, world):
    """Thresholds and clip flags stay equal step by step, and so do the weights."""
    results = ranks.run(ranks.changed_while_running, world, tmp_path, listening=world)
    first = results[0]
    assert all(result == first for result in results[1:])
    thresholds = [threshold for threshold, _ in first["taken"]]
    assert set(thresholds) == {5.0, 0.5}
    ((applied, refused),) = query("SELECT applied_step, refused FROM threshold_changes")
    assert refused is None
    assert thresholds == [5.0] * applied + [0.5] * (len(thresholds) - applied)
    assert query("SELECT rank, step FROM events WHERE kind = 'threshold_changed'") == [(0, applied)]


def test_a_threshold_that_one_rank_would_not_take_is_taken_by_none(tmp_path):
    """A rank without remote control does not answer; the others leave things as they are."""
    results = ranks.run(ranks.changed_while_running, 3, tmp_path, listening=2)
    assert all(result == results[0] for result in results[1:])
    assert {threshold for threshold, _ in results[0]["taken"]} == {5.0}
    ((applied, refused),) = query("SELECT applied_step, refused FROM threshold_changes")
    assert applied is None
    assert "not all of the other 2 ranks answered" in refused


def test_one_rank_alone_may_be_watched(tmp_path):
    """Nothing waits for ranks that are not."""
    one, other = ranks.run(ranks.one_rank_watched, 2, tmp_path)
    assert one == other
    assert query("SELECT count(*) FROM steps") == [(120,)]


PLAIN = ("ClipNorm(5.0)", True, "1")
CASES = [
    (
        "fsdp",
        2,
        [
            PLAIN,
            ("ClipNorm(5.0)", False, "1"),
            ("ClipNorm(5.0)", True, "0"),
            ("ClipValue(0.5)", True, "1"),
            ("ClipLayerNorm(2.0)", True, "1"),
            ("AdaptiveGradientClip(0.1)", True, "1"),
        ],
    ),
    ("fsdp", 4, [PLAIN, ("ClipValue(0.5)", True, "1")]),
    ("hsdp", 4, [PLAIN]),
    ("tensor", 2, [PLAIN, ("ClipValue(0.5)", False, "1")]),
    ("tensor", 4, [("ClipNorm(5.0)", False, "1"), ("AdaptiveGradientClip(0.1)", False, "1")]),
    ("both", 4, [PLAIN]),
]


@pytest.mark.parametrize(("kind", "world", "variants"), CASES, ids=lambda v: str(v)[:4])
def test_sharded_models(tmp_path, kind, world, variants):
    """FSDP2, HSDP, tensor parallelism and both: against the whole model in one process."""
    all_results = ranks.run(ranks.sharded, world, tmp_path, kind=kind, variants=variants)
    for variant, results in zip(variants, zip(*all_results, strict=True), strict=True):
        check_against_torch(results, tolerance=2e-5)
        assert all(r["clipped"] == results[0]["clipped"] for r in results)
        assert any(results[0]["clipped"])
        name = " ".join(map(str, variant))
        ((run_id, steps),) = query(
            f"SELECT r.id, count(*) FROM runs r JOIN steps s ON s.run_id = r.id "
            f"WHERE r.name = '{name}'"
        )
        assert steps == 7
        ((data, rank),) = query(
            f"SELECT data, rank FROM events WHERE kind = 'nonfinite_gradient' AND run_id = {run_id}"
        )
        found = json.loads(data)
        assert found["parameters"] == {"0.weight": "nan"}
        if kind in {"fsdp", "tensor"}:
            assert (found["ranks"], rank) == ([world - 1], world - 1)
        else:  # under HSDP those of rank 0's replica
            assert (found["ranks"], rank) == (([0, 1] if kind == "hsdp" else [0, 1, 2, 3]), None)
        weight = ranks.mlp(sizes=(8, 20, 12, 1))[0].weight.detach().norm().item()
        assert query(
            f"SELECT weight_norm FROM layer_norms "
            f"WHERE step = 0 AND parameter = '0.weight' AND run_id = {run_id}"
        ) == [(pytest.approx(weight),)]


def test_zero_redundancy_optimizer(tmp_path):
    """One record a step, and the global norm."""
    check_against_torch(ranks.run(ranks.zero_redundancy, 2, tmp_path))
    assert query("SELECT count(*) FROM steps") == [(7,)]
