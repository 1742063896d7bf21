"""The flight recorder: what was written is read, what is torn or foreign is not trusted."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from gradwatch.errors import RingError
from gradwatch.recorder import EVENT_DTYPE, FLAGS, STEP_DTYPE, NullRing, Ring


def fill(ring, steps, first=0):
    for step in range(first, first + steps):
        ring.append(step, 1.0, 2.0, 0.5, 0.1, 3.0, 1.0, 1.0, math.nan, FLAGS.CLIPPED)


@pytest.fixture
def ring(tmp_path):
    ring = Ring.create(tmp_path / "a" / "x.ring", {"uid": "u"}, steps=100, events=64)
    yield ring
    ring.close()


def test_records_come_back(ring):
    """In order, with every field."""
    ring.append(7, 1.5, 2.5, 0.25, 0.1, 3.0, 1.0, 1.0, 1024.0, FLAGS.CLIPPED | FLAGS.SKIPPED)
    read = ring.read_steps(0)
    assert (read.cursor, read.overwritten, read.torn) == (1, 0, 0)
    row = dict(zip(STEP_DTYPE.names, read.records[0].tolist(), strict=True))
    assert row == {
        "seq": 1, "step": 7, "time": 1.5, "monotonic": 2.5, "loss": 0.25, "lr": 0.1,
        "pre_norm": 3.0, "post_norm": 1.0, "threshold": 1.0, "loss_scale": 1024.0,
        "flags": 9, "reserved": 0, "seq_end": 1,
    }  # fmt: skip


def test_reading_goes_on_from_the_cursor(ring):
    """Nothing is read twice; a limit is kept."""
    fill(ring, 30)
    first = ring.read_steps(0, limit=20)
    second = ring.read_steps(first.cursor)
    assert first.records["step"].tolist() == list(range(20))
    assert second.records["step"].tolist() == list(range(20, 30))
    assert len(ring.read_steps(second.cursor).records) == 0


def test_a_full_ring_overwrites_the_oldest_and_says_how_many(ring):
    """250 records in a ring of 100: the last 100 are there, 150 are counted as lost."""
    fill(ring, 250)
    read = ring.read_steps(0)
    assert read.records["step"].tolist() == list(range(150, 250))
    assert (read.cursor, read.overwritten, read.torn) == (250, 150, 0)


def test_another_process_reads_the_file(ring):
    """The file alone holds the records, the events and who the run was."""
    fill(ring, 3)
    ring.append_event(b"hello")
    other = Ring.open(ring.path)
    assert other.read_steps(0).records["step"].tolist() == [0, 1, 2]
    assert other.read_events(0).payloads == [b"hello"]
    assert other.metadata == {"uid": "u"}
    other.close()


def test_long_events_are_cut_and_joined(ring):
    """An event of any size that fits half the ring comes back whole."""
    sizes = [0, 1, 479, 480, 481, 5000]
    for size in sizes:
        ring.append_event(os.urandom(size))
    assert [len(p) for p in ring.read_events(0).payloads] == sizes


def test_an_event_whose_beginning_was_overwritten_is_left_out(ring):
    """Half an event is not an event."""
    ring.append_event(bytes(480 * 20))
    for _ in range(8):
        ring.append_event(bytes(480 * 7))  # 20 + 56 slots in a ring of 64
    read = ring.read_events(0)
    assert [len(p) for p in read.payloads] == [480 * 7] * 8
    assert (read.overwritten, read.torn) == (12, 8)


def test_an_event_that_cannot_fit_is_refused(ring):
    """It would overwrite its own beginning."""
    with pytest.raises(RingError, match="does not fit"):
        ring.append_event(bytes(480 * 40))


def test_torn_records_are_skipped_and_counted(ring):
    """A record whose two sequence numbers differ was being written when the process died."""
    fill(ring, 10)
    at = ring._steps_at + 4 * STEP_DTYPE.itemsize
    struct.pack_into("<Q", ring._buffer, at, 999)
    slot = ring._events_at
    ring.append_event(b"whole")
    ring.append_event(b"torn")
    struct.pack_into("<Q", ring._buffer, slot + 2 * EVENT_DTYPE.itemsize - 8, 0)
    read = ring.read_steps(0)
    assert read.records["step"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert read.torn == 1
    events = ring.read_events(0)
    assert (events.payloads, events.torn) == ([b"whole"], 1)


def test_files_that_are_no_rings_are_refused(tmp_path, ring):
    """Foreign, empty, cut short, of another version, or never finished: each is said."""
    whole = ring.path.read_bytes()
    for content, words in (
        (b"", "cannot read"),
        (b"x" * 10_000, "not a flight-recorder file"),
        (bytes(8) + whole[8:], "not a flight-recorder file"),
        (whole[:20_000], "cut short"),
        (whole[:8] + struct.pack("<I", 9) + whole[12:], "version 9"),
    ):
        path = tmp_path / "foreign.ring"
        path.write_bytes(content)
        with pytest.raises(RingError, match=words):
            Ring.open(path)
    with pytest.raises(RingError, match="cannot read"):
        Ring.open(tmp_path / "missing.ring")


def test_the_file_is_allocated_for_real(ring):
    """Its blocks are on the disk from the start: a full disk cannot kill a later step."""
    stat = ring.path.stat()
    assert stat.st_blocks * 512 >= stat.st_size
    assert stat.st_mode & 0o077 == 0


def test_a_ring_that_exists_is_never_taken_over(ring):
    """Two processes cannot write one file."""
    with pytest.raises(RingError, match="File exists"):
        Ring.create(ring.path, {}, steps=100, events=64)


def test_a_folder_that_cannot_be_written_fails_cleanly(tmp_path):
    """The error names the file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RingError, match=r"file/x\.ring"):
        Ring.create(tmp_path / "file" / "x.ring", {}, steps=100, events=64)


def test_in_memory_behaves_the_same():
    """Without a disk, all but outliving the process."""
    ring = Ring.in_memory({"uid": "u"}, steps=10, events=64)
    fill(ring, 12)
    assert ring.path is None
    assert ring.read_steps(0).overwritten == 2
    ring.close(remove=True)


def test_null_ring_takes_anything():
    """Recording that is off costs nothing and fails nowhere."""
    NullRing().append(*range(10))
    NullRing().append_event(b"x")


WRITER = """
import itertools, math, sys
from pathlib import Path
from gradwatch.recorder import Ring
ring = Ring.create(Path(sys.argv[1]), {}, steps=4096, events=64)
for i in itertools.count():
    ring.append(i, 1.0, 2.0, i * 0.5, 0.1, 3.0, 1.0, 1.0, math.nan, 1)
    if i % 1000 == 0:
        ring.append_event(b"%d" % i)
    if i == 0:
        print("ready", flush=True)
"""


def test_sigkill_loses_no_whole_record(tmp_path):
    """Killed at random moments at full speed: all before the head is there, right and in order."""
    for attempt in range(8):
        path = tmp_path / f"{attempt}.ring"
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.01 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        ring = Ring.open(path)
        head, _ = ring.heads
        read = ring.read_steps(0)
        expected = range(max(0, head - 4096), head)
        # The one slot being overwritten at the kill is the oldest, and may be torn.
        assert read.torn <= 1
        assert read.records["step"].tolist()[-1] == head - 1
        assert set(expected) - set(read.records["step"].tolist()) <= {expected[0]}
        assert (read.records["loss"] == read.records["step"] * 0.5).all()
        assert all(json.loads(p) % 1000 == 0 for p in ring.read_events(0).payloads)
        ring.close()
