"""Rows of `step_summaries`, made from `step_records` in the transaction that completes a block.

A block is read back from the table, so its row says what is stored, whoever stored it and however
often: made again, it is the same. Only one that came in whole, with batches that were new to their
last record, need not be read: the sink keeps the `tail` of a fast job's batch, the records of the
block that the batch has begun, and puts it before the next batch. (To read a row, the driver gives
the interpreter lock back and waits for it again, a thousand times a block.)
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa

from gradwatch.cells import LEAST, MOST, flags, numbers, whole_numbers
from gradwatch.recorder import FLAGS
from gradwatch.schema import step_records, step_summaries
from gradwatch.sinks import bulk
from gradwatch.summaries import BLOCK, INPUTS, completed, summarise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch.records import Batch, RunInfo
    from gradwatch.sinks.rows import Stored

__all__ = ["completed_by", "fill", "records_of", "rows_of", "store", "tail"]

Records = np.ndarray[Any, np.dtype[np.void]]

_TOGETHER = 20  # blocks a query
_FAST = 200  # steps a batch, from which on the tail is kept; a slower job's block is read back
_REPLACE = "(run_id, attempt, block) DO UPDATE SET " + ", ".join(
    f"{column.name} = excluded.{column.name}"
    for column in step_summaries.columns
    if not column.primary_key
)
_FLAGS = {
    "clipped": FLAGS.CLIPPED,
    "nonfinite": FLAGS.NONFINITE,
    "nonfinite_loss": FLAGS.NONFINITE_LOSS,
    "skipped": FLAGS.SKIPPED,
}


def completed_by(run: RunInfo, batch: Batch) -> list[int]:
    """The blocks of the attempt that this batch completes; none of ranks whose steps are not kept."""
    if run.rank != 0:
        return []
    return completed(batch.steps["step"], run.start_step + batch.first[0])


def store(
    connection: sa.Connection,
    stored: Stored,
    blocks: Sequence[int],
    batch: Records | None = None,
    until: int = 2**63 - 1,
) -> None:
    """Make the rows of these blocks, or make them again; of the steps before `until`.

    `batch` are records of which the table has each as it stands there.
    """
    own = {"run_id": stored.run_id, "attempt": stored.attempt}
    at_hand = [*_whole(blocks, batch)] if batch is not None else []
    others = sorted({*blocks} - {row["block"] for row in at_hand})
    read_back = (
        row
        for start, stop in _in_a_row(others)
        for row in rows_of(records_of(connection, stored, start * BLOCK, min(stop * BLOCK, until)))
    )
    values = [
        {**own, **row}[column.name]
        for row in itertools.chain(at_hand, read_back)
        for column in step_summaries.columns
    ]
    bulk.insert(connection, step_summaries, values, _REPLACE)


def tail(records: Records) -> Records | None:
    """What `store` needs of these records beside the batch that comes next; None: nothing."""
    if not len(records) or (len(records) < _FAST and records["step"][0] % BLOCK):
        return None
    start = int(records["step"][-1]) // BLOCK * BLOCK
    return records[int(np.searchsorted(records["step"], start)) :].copy()


def _whole(blocks: Sequence[int], batch: Records) -> Iterator[dict[str, Any]]:
    """The rows of those blocks of which all that is stored is in the batch.

    Such are those after its first one, though steps be missing, and that one if none is missing.
    """
    steps = batch["step"]
    if not len(steps) or not blocks or (np.diff(steps) <= 0).any():
        return
    wanted = np.array(blocks)
    start, stop = np.searchsorted(steps, [wanted * BLOCK, (wanted + 1) * BLOCK])
    whole = (stop > start) & ((start > 0) | (stop - start == BLOCK))
    kept = [np.arange(*ends) for ends in zip(start[whole], stop[whole], strict=True)]
    if kept:
        records = _as_stored(batch[np.concatenate(kept)])
        yield from rows_of(records)


def _as_stored(records: Records) -> dict[str, Any]:
    """Records of the ring as `records_of` reads them back."""
    columns: dict[str, Any] = {name: (records["flags"] & bit) != 0 for name, bit in _FLAGS.items()}
    for name in INPUTS:
        if name not in columns:
            values = records[name]
            columns[name] = values if name == "step" else np.where(np.isinf(values), np.nan, values)
    columns["time"] = np.nan_to_num(columns["time"])
    return columns


def fill(connection: sa.Connection, stored: Stored) -> None:
    """Make the rows of all complete blocks of an attempt."""
    step = step_records.c.step
    mine = sa.select(step).where(
        step_records.c.run_id == stored.run_id,
        step_records.c.attempt == stored.attempt,
        step.between(LEAST, MOST),
    )
    last = connection.execute(mine.order_by(step.desc()).limit(1)).scalar()
    end = 0 if last is None else (last + 1) // BLOCK
    block = 0
    while block < end:
        following = mine.where(step >= block * BLOCK).order_by(step).limit(1)
        block = connection.execute(following).scalar_one() // BLOCK
        store(connection, stored, range(block, min(block + _TOGETHER, end)))
        block += _TOGETHER


def rows_of(records: dict[str, Any]) -> list[dict[str, Any]]:
    """A row without run and attempt for each block of which there are records, in their order."""
    blocks = records["step"] // BLOCK
    if not len(blocks):
        return []
    starts = np.flatnonzero(np.diff(blocks, prepend=-1)).tolist()
    rows = summarise(records, starts)
    return [
        {"block": block, **row} for block, row in zip(blocks[starts].tolist(), rows, strict=True)
    ]


def _in_a_row(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Blocks as ranges [start, stop) of at most twenty."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        start, stop = ranges[-1] if ranges else (block, -1)
        if stop == block and stop - start < _TOGETHER:
            ranges[-1] = (start, block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges


def records_of(
    connection: sa.Connection, stored: Stored, start: int, stop: int
) -> dict[str, np.ndarray[Any, Any]]:
    """An attempt's records with steps in [start, stop), in their order."""
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    found = connection.exec_driver_sql(
        f"SELECT {', '.join(INPUTS)} FROM step_records WHERE run_id = {mark} "  # noqa: S608
        f"AND attempt = {mark} AND step >= {mark} AND step < {mark} ORDER BY step",
        (stored.run_id, stored.attempt, start, stop),
    ).fetchall()
    values = dict(
        zip(INPUTS, zip(*found, strict=True) if found else [()] * len(INPUTS), strict=True)
    )
    steps, good = whole_numbers(values.pop("step"))
    columns: dict[str, np.ndarray[Any, Any]] = {"step": steps}
    for name, column in values.items():
        columns[name] = flags(column).astype(np.float64) if name in _FLAGS else numbers(column)
    return columns if good is None else {name: column[good] for name, column in columns.items()}
