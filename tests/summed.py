"""The rows of `step_summaries`, and what SQL says that they should be."""

import numpy as np
import pytest
import sqlalchemy as sa

from gradwatch import schema, summaries


def summed_up(url):
    """All rows of `step_summaries`, by attempt and block."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(sa.select(schema.step_summaries)).mappings().all()
    engine.dispose()
    return {(row["attempt"], row["block"]): dict(row) for row in rows}


def counted(url):
    """The same from the database's own aggregates over the steps; blocks that go on left out."""
    block = "(step - step % 1000) / 1000"
    flags = {name: f"sum(CASE WHEN {name} THEN 1 ELSE 0 END)"
             for name in ("clipped", "nonfinite", "nonfinite_loss", "skipped")}  # fmt: skip
    overflow = "skipped AND NOT nonfinite AND pre_norm IS NULL AND loss_scale IS NOT NULL"
    told = {
        "first_step": "min(step)", "last_step": "max(step)", "last_time": "max(time)",
        "steps": "count(*)", "finite": "count(pre_norm)",
        "zeros": "sum(CASE WHEN pre_norm = 0 THEN 1 ELSE 0 END)", **flags,
        "amp_overflows": f"sum(CASE WHEN {overflow} THEN 1 ELSE 0 END)",
        "pre_norm_min": "min(CASE WHEN pre_norm > 0 THEN pre_norm END)",
        "post_norm_min": "min(CASE WHEN post_norm > 0 THEN post_norm END)",
        "pre_norm_max": "max(pre_norm)", "post_norm_max": "max(post_norm)",
        "threshold_min": "min(threshold)", "threshold_max": "max(threshold)",
        "loss_min": "min(loss)", "loss_mean": "avg(loss)", "loss_max": "max(loss)",
    }  # fmt: skip
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        query = (
            f"SELECT attempt, {block}, {', '.join(told.values())} FROM step_records GROUP BY 1, 2"
        )
        found = connection.execute(sa.text(query)).fetchall()
        ends = dict(
            connection.exec_driver_sql(
                "SELECT attempt, max(step) FROM step_records GROUP BY attempt"
            ).fetchall()
        )
        norms = connection.exec_driver_sql(
            "SELECT attempt, step, pre_norm FROM step_records WHERE pre_norm > 0 ORDER BY step"
        ).fetchall()
    engine.dispose()
    rows = {}
    for attempt, number, *values in found:
        if (number + 1) * 1000 <= ends[attempt] + 1:
            rows[attempt, number] = dict(zip(told, values, strict=True))
            mine = [n for a, step, n in norms if a == attempt and step // 1000 == number]
            rows[attempt, number]["norms"] = summaries.encode(np.array(mine))
    return rows


def check(url):
    """Rows for exactly the blocks that are complete, saying what SQL says."""
    made, asked = summed_up(url), counted(url)
    assert made.keys() == asked.keys()
    for key, expected in asked.items():
        told = {name: made[key][name] for name in expected}
        assert told.pop("norms") == expected.pop("norms")
        assert told == pytest.approx(expected, rel=1e-9)
    return made
