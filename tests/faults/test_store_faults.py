"""What can become of a store under a job: training goes on, it is said once, nothing is lost."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from jobs import check_stored, query, stored, wait_until

from gradwatch.channel import Channel
from gradwatch.delivery import Delivery
from gradwatch.recorder import Ring
from gradwatch.sinks import NullSink
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import ManualClock, run_info
from gradwatch.troubles import Troubles
from gradwatch_dashboards import doctor

NOBODY = 65534
AGAIN = "gradwatch: the store takes records again"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB: one flight recorder and a small store fit on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def open_folder():
    """A folder that every user reaches and can write."""
    if os.getuid() != 0:
        pytest.skip("only root can take another user's rights away")
    folder = Path(tempfile.mkdtemp(prefix="gradwatch-test-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def remount(disk, how):
    """Make a disk read-only, or one that can be written again."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], capture_output=True, check=True)


def fill(disk):
    """Write to a disk until not a byte is free; the file that does it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def goes_on_and_recovers(job, store, mend):
    """Training goes on under the fault; mended, all that was recorded is stored, and that is said.

    The two things that it was told: the fault, that it is over.
    """
    job.go_on(300)
    mend()
    mended = job.steps()
    wait_until(lambda: stored(store) > mended, job.said)
    job.end()
    check_stored(store, job)
    *faults, again = job.said()
    assert again == AGAIN
    return faults


# -- a full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [False, True])
def test_a_disk_that_is_full_from_the_start(factory, small_disk, tmp_path, memory):
    """The flight recorder goes elsewhere: to the temporary folder, or where it must not, memory."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ring = {"GRADWATCH_RING_DIR": str(small_disk)} if memory else {}
    filler = fill(small_disk)
    store = small_disk / "runs.db"
    job = factory.start(tmp_path / "job", store, TMPDIR=str(temporary), **ring)
    job.is_told("cannot write the store")
    files = list(temporary.glob("*/*.ring"))
    assert len(files) == (not memory)
    *other, fault = goes_on_and_recovers(job, store, filler.unlink)
    assert "database or disk is full (free some space on its disk)" in fault
    assert fault.endswith(str(files[0]) if files else "in memory, and would not outlive a crash")
    assert ["No space left on device" in line for line in other] == [True] * memory


def test_a_disk_that_fills_up(factory, small_disk, tmp_path):
    """The flight recorder's space is its own: no step is killed by SIGBUS."""
    store = small_disk / "runs.db"
    job = factory.start(tmp_path / "job", store)
    wait_until(lambda: stored(store) > 100, job.said)
    filler = fill(small_disk)
    job.is_told("cannot write the store")
    (fault,) = goes_on_and_recovers(job, store, filler.unlink)
    assert "database or disk is full (free some space on its disk)" in fault
    assert ".ring" in fault


@pytest.mark.parametrize(
    ("seconds", "said"), [(1.0, []), (3.0, ["cannot write the store", "takes records again"])]
)
def test_what_passes_at_once_is_not_said(small_disk, caplog, seconds, said):
    """A job may not write while a reader that is root makes SQLite's files: for a moment."""
    store = DatabaseSink(f"sqlite:///{small_disk}/runs.db")
    ring = Ring.in_memory({}, steps=10, events=64)
    channel = Channel(run_info(), ring, store, NullSink(), parameters=list)
    clock = ManualClock()
    delivery = Delivery(clock, Troubles())
    for how in ("ro", "ro", "rw"):
        clock.advance(seconds)
        remount(small_disk, how)
        channel.urgent = True
        delivery.serve(channel)
        assert (channel.store.run is None) == (how == "ro")
    assert len(caplog.messages) == len(said)
    assert all(words in m for words, m in zip(said, caplog.messages, strict=True))
    store.dispose()
    ring.close()


def test_doctor_sees_a_full_disk(small_disk, monkeypatch, tmp_path):
    """The store's and the flight recorder's, each on its own; neither once there is room."""
    monkeypatch.setenv("GRADWATCH_RING_DIR", str(tmp_path))
    monkeypatch.setenv("GRADWATCH_STORE", store := f"sqlite:///{small_disk}/runs.db")
    DatabaseSink(store).open(run_info())

    def full():
        told = doctor.examine(store, {})
        return [c.subject for c in told if c.status == "problem" and "is full" in c.detail]

    assert full() == []
    filler = fill(small_disk)
    assert full() == ["store"]
    monkeypatch.setenv("GRADWATCH_RING_DIR", str(small_disk / "rings"))
    assert full() == ["store", "flight recorder"]
    filler.unlink()
    assert full() == []


# -- the folder, and who may use it ----------------------------------------------------------------


def test_a_folder_that_is_deleted(factory, tmp_path):
    """It is made anew, with all that the flight recorder holds, though its file is gone as well."""
    store = tmp_path / "folder" / "runs.db"
    job = factory.start(tmp_path / "job", store)
    wait_until(lambda: stored(store) > 100, job.said)
    store.parent.rename(tmp_path / "gone")  # all at once: the job may make it anew at any moment
    shutil.rmtree(tmp_path / "gone")
    job.is_told("deleted or emptied")
    (fault,) = goes_on_and_recovers(job, store, lambda: None)
    assert "the run is stored anew; records are kept in memory" in fault


def test_a_folder_that_is_deleted_and_cannot_be_made(factory, tmp_path):
    """A file lies in its place for a while."""
    store = tmp_path / "mount" / "folder" / "runs.db"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mount").symlink_to(tmp_path / "elsewhere")
    job = factory.start(tmp_path / "job", store)
    wait_until(lambda: stored(store) > 100, job.said)
    (tmp_path / "file").write_text("")
    (tmp_path / "file").replace(tmp_path / "mount")  # all at once, as above
    job.is_told("cannot write the store")
    (fault,) = goes_on_and_recovers(job, store, (tmp_path / "mount").unlink)
    assert "a file lies where its folder should be: move it away" in fault


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_folder_that_the_job_may_not_use(factory, open_folder, when):
    """It belongs to somebody else from the start, or from some step on."""
    store = open_folder / "folder" / "runs.db"
    store.parent.mkdir()

    def give(user):
        os.chown(store.parent, user, user)

    store.parent.chmod(0o700)
    if when == "during":
        give(NOBODY)
    job = factory.start(open_folder / "job", store, user=NOBODY, TMPDIR=str(open_folder))
    if when == "during":
        wait_until(lambda: stored(store) > 100, job.said)
        give(0)
    job.is_told("cannot write the store")
    (fault,) = goes_on_and_recovers(job, store, lambda: give(NOBODY))
    assert "this user has to be able to write the file and its folder" in fault


# -- a lock ----------------------------------------------------------------------------------------

LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("COMMIT")
"""


def test_a_store_that_another_program_locks(factory, tmp_path):
    """For 5 seconds, or as many as TEST_LOCK_SECONDS says; the promise is 60."""
    seconds = float(os.environ.get("TEST_LOCK_SECONDS", "5"))
    store = tmp_path / "runs.db"
    job = factory.start(tmp_path / "job", store)
    wait_until(lambda: stored(store) > 100, job.said)
    with subprocess.Popen(
        [sys.executable, "-c", LOCK, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        before, until = job.steps(), time.monotonic() + seconds
        while time.monotonic() < until:
            job.go_on(50)
        there = stored(store)
        assert there <= before < job.steps() - 50
        (fault,) = goes_on_and_recovers(job, store, other.stdin.close)
    assert "database is locked (another program is writing to it, and has to let go)" in fault


# -- damage ----------------------------------------------------------------------------------------


def write_over(store):
    """As `cp notes.txt runs.db` does, or a download."""
    with store.open("r+b") as file:
        file.write(b"a text\n" * 2000)
        file.truncate()


def replace(store):
    """As an editor does, or rsync."""
    other = store.with_name("other")
    other.write_text("a text\n" * 2000)
    other.rename(store)


def spoil_pages(store):
    """As a failing disk does, from the second page on."""
    size = store.stat().st_size
    with store.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))


def spoil_header(store):
    """The first page."""
    with store.open("r+b") as file:
        file.write(os.urandom(4096))


def cut_short(store):
    """As a copy that did not end."""
    os.truncate(store, 3 * 4096)


@pytest.mark.parametrize(
    ("damage", "folded", "since"),
    [
        (write_over, False, False),
        (write_over, True, False),
        (replace, False, False),
        (spoil_header, True, False),
        (spoil_pages, True, False),
        (spoil_pages, True, True),
        (cut_short, True, False),
        (cut_short, True, True),
    ],
)
def test_a_file_that_is_damaged_stays_as_it_is(factory, tmp_path, damage, folded, since):
    """Whether the WAL, which could mend some of it, had been folded into it before, or some of it."""
    store = tmp_path / "runs.db"
    job = factory.start(tmp_path / "job", store)
    wait_until(lambda: stored(store) > 300, job.said)
    if folded:
        with contextlib.closing(sqlite3.connect(store)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if since:
        there = stored(store)
        wait_until(lambda: stored(store) > there, job.said)
    damage(store)
    content = store.read_bytes()
    job.is_told("cannot write the store")

    def move_away():
        assert store.read_bytes() == content
        store.rename(tmp_path / "damaged")

    (fault,) = goes_on_and_recovers(job, store, move_away)
    assert (tmp_path / "damaged").read_bytes() == content
    assert "move the file away: a new one is then made" in fault


# -- many at once ----------------------------------------------------------------------------------

FORKS = """
import os, torch
from torch.utils.data import DataLoader
def each(step):
    if step == 0:  # a machine that does other things for so long is none of our business
        agent._recording.pipeline._delivery.patience = 10.0
    if step % 100 == 50:
        child = os.fork()
        if child == 0:
            optimizer.step()
            os._exit(0 if agent.flush() else 1)
        assert os.waitpid(child, 0)[1] == 0
    if step % 200 == 100:
        assert len(list(DataLoader(torch.randn(8, 3), batch_size=4, num_workers=1))) == 2
"""


def test_eight_processes_that_fork_write_one_store(factory, tmp_path):
    """Each its own run, to the step; what their children do is nobody's. To wait is no fault."""
    store = tmp_path / "runs.db"
    jobs = [
        factory.start(tmp_path / f"job-{i}", store, code=FORKS, seed=i, GRADWATCH_RUN_ID=f"uid-{i}")
        for i in range(8)
    ]
    for job in jobs:
        wait_until(lambda job=job: job.steps() >= 250, job.said)
    for job in jobs:
        job.stop()
    for job in jobs:
        job.end()
        assert job.said() == []
    ids = dict(query(store, "SELECT uid, id FROM runs"))
    for i, job in enumerate(jobs):
        check_stored(store, job, ids[f"uid-{i}"])
    assert stored(store) == sum(job.steps() for job in jobs)
    assert query(store, "SELECT DISTINCT status FROM runs") == [("finished",)]
    assert list(tmp_path.glob("runs.db.rings/*")) == []
