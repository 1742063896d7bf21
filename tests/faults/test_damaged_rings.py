"""Flight recorders that were damaged: what proves itself is stored, the rest is counted and told.

Offsets are as the recorder's layout says.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import PREAMBLE, query
from typer.testing import CliRunner

from gradwatch.recorder import Ring
from gradwatch.recovery import recover
from gradwatch.salvage import claim
from gradwatch_dashboards.cli import app


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The flight recorder that a job of 500 steps left, and nothing in the store yet."""
    folder = tmp_path_factory.mktemp("left")
    subprocess.run(
        [sys.executable, "-c",
         f"{PREAMBLE}\nos.mkdir('gradwatch.db'); begin(); steps(500)\ndie()"],
        cwd=folder, check=False, timeout=60,
    )  # fmt: skip
    (folder / "gradwatch.db").rmdir()
    (path,) = (folder / "gradwatch.db.rings").iterdir()
    return path


@pytest.fixture
def ring(left):
    """A copy of it, where it will be found."""
    Path("gradwatch.db.rings").mkdir()
    copy = Path("gradwatch.db.rings") / left.name
    shutil.copy(left, copy)
    return copy


def write_at(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def record_at(path, number):
    """The offset of a step record, counted from 0."""
    (metadata,) = struct.unpack_from("<Q", path.read_bytes(), 40)
    return 4096 + -(-metadata // 4096) * 4096 + number * 96


def recovered_steps():
    return [step for (step,) in query("SELECT step FROM steps ORDER BY step")]


@pytest.mark.parametrize("head", [0, 499, 2**60, 2**64 - 1])
def test_a_head_that_is_wrong_costs_nothing(ring, head):
    """Also a record that is whole though the head had not moved past it is stored."""
    write_at(ring, 64, struct.pack("<Q", head))
    (one,) = recover("sqlite:///gradwatch.db")
    assert (one.steps, one.lost, one.problem) == (500, 0, None)
    assert recovered_steps() == list(range(500))


@pytest.mark.parametrize("kind", ["first bytes", "last bytes", "foreign", "zeros"])
def test_a_record_that_does_not_prove_itself_is_skipped_and_counted(ring, kind):
    """Torn at either end, another's in its place, never written: that one is gone, no other."""
    at = record_at(ring, 123)
    content = ring.read_bytes()
    write_at(ring, *{
        "first bytes": (at, struct.pack("<Q", 0)),
        "last bytes": (at + 88, struct.pack("<Q", 7)),
        "foreign": (at, content[record_at(ring, 77) :][:96]),
        "zeros": (at, bytes(96)),
    }[kind])  # fmt: skip
    (one,) = recover("sqlite:///gradwatch.db")
    assert (one.steps, one.lost) == (499, 1)
    assert recovered_steps() == [step for step in range(500) if step != 123]
    ((data,),) = query("SELECT data FROM events WHERE kind = 'records_dropped'")
    assert json.loads(data) == {"torn": 1}


def test_a_file_that_is_cut_short_gives_what_it_has(ring):
    """300 whole records and a half one: those are stored, the others are counted."""
    os.truncate(ring, record_at(ring, 300) + 48)
    (one,) = recover("sqlite:///gradwatch.db")
    assert (one.steps, one.lost, one.problem) == (300, 200, None)
    assert recovered_steps() == list(range(300))


@pytest.mark.parametrize(
    ("offset", "content", "words"),
    [
        (0, b"SOMEBODY", "is not a flight-recorder file"),
        (8, struct.pack("<I", 2), "format version 2; this gradwatch reads version 1"),
        (16, struct.pack("<Q", 2**50), "has a header that was written over"),
        (40, struct.pack("<Q", 2**40), "has a header that was written over"),
        (4096, b"no JSON", "cannot be read"),
        (4096, b"{}       ", "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_trusted_stays_and_is_told(ring, offset, content, words):
    """Nothing of it is stored, nothing is deleted, the exit status is 1."""
    write_at(ring, offset, content)
    result = CliRunner().invoke(app, ["recover"])
    assert result.exit_code == 1
    assert words in result.output
    assert ring.exists()
    assert not Path("gradwatch.db").exists()


def test_a_file_that_no_one_read_returns_is_read_whole(ring, monkeypatch):
    """A read returns 2 GiB at most, and less where it likes: here, 1000 bytes."""
    content, read = ring.read_bytes(), os.preadv

    def short(descriptor, buffers, offset):
        return read(descriptor, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", short)
    taken = claim(ring)
    copied = taken._buffer[: len(content)]
    taken.close()
    assert copied == content


def test_files_in_the_making_are_swept(ring):
    """What a process that died while it made its ring has left: gone after a while, not before."""
    for name, age in (("old", 100), ("young", 1)):
        path = ring.parent / f"{name}.ring.new"
        path.write_bytes(b"")
        os.utime(path, (time.time() - age, time.time() - age))
    recover("sqlite:///gradwatch.db")
    assert [path.name for path in ring.parent.iterdir()] == ["young.ring.new"]


def test_rings_of_another_store_are_not_taken(ring):
    """In a folder that stores share, each takes its own."""
    shared = Path("shared").absolute()
    ring.parent.rename(shared)
    recorded = Ring.open(next(shared.iterdir())).metadata["store"]
    result = CliRunner().invoke(app, ["recover", str(shared), "--store", "other.db"])
    assert result.exit_code == 1
    assert f"was recorded for {recorded}: name that store with --store" in result.output
    (one,) = recover(recorded, [shared])
    assert one.steps == 500
