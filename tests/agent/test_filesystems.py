"""Network file systems are recognised, said once, and hold no flight recorder."""

import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from gradwatch import Agent, filesystems, rings
from gradwatch.config import Settings
from gradwatch.recovery import recover
from gradwatch.testing import run_info
from gradwatch_dashboards.doctor import examine

# As on a cluster's node: lines of proc_pid_mountinfo(5), with and without optional fields.
MOUNTINFO = """\
22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
36 22 0:32 / /tmp rw,nosuid,nodev shared:17 - tmpfs tmpfs rw,size=65536k
98 22 0:47 / /home rw,relatime shared:60 master:3 - nfs4 filer:/export/home rw,vers=4.2
99 98 8:17 / /home/me/local rw,relatime - xfs /dev/sdb1 rw
101 22 0:51 / /scratch rw shared:63 - lustre 10.0.0.1@o2ib:/scratch rw
102 22 0:52 / /data/two\\040words rw - fuse.sshfs host:/data rw
103 22 0:53 / /mnt/c rw - 9p C:\\134 rw
104 22 0:54 / /stacked rw - ext4 /dev/sdc1 rw
105 104 0:55 / /stacked rw - cifs //server/share rw
106 22 0:56 / /disk rw - fuseblk /dev/sdd1 rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/gradwatch.db", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/runs/gradwatch.db", "nfs4"),
        ("/home/me/local/gradwatch.db", "xfs"),
        ("/homework/x", "ext4"),
        ("/scratch/x", "lustre"),
        ("/data/two words/x", "fuse.sshfs"),
        ("/mnt/c/x", "9p"),
        ("/stacked/x", "cifs"),
        ("/disk/x", "fuseblk"),
        ("/tmp/x", "tmpfs"),
    ],
)
def test_the_deepest_and_latest_mount_counts(path, kind):
    """Not the first that fits, not one whose name only begins alike."""
    assert filesystems.kind_of(path, MOUNTINFO) == kind


def test_this_machines_own_table_agrees_with_the_kernel(tmp_path):
    """The device of the mount that was found is the path's own."""
    table = Path("/proc/self/mountinfo").read_text()
    for path in (tmp_path, Path("/proc/self"), Path("/dev/shm")):
        kind = filesystems.kind_of(os.path.realpath(path), table)
        device = path.stat().st_dev
        kinds = {
            line.partition(" - ")[2].split(" ")[0]
            for line in table.splitlines()
            if line.split(" ")[2] == f"{os.major(device)}:{os.minor(device)}"
        }
        assert kind in kinds


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """The working directory is on NFS, as far as this machine's table tells."""
    table = f"{MOUNTINFO}110 22 0:60 / {tmp_path / 'nfs'} rw - nfs4 filer:/x rw\n"
    (tmp_path / "nfs").mkdir()
    monkeypatch.chdir(tmp_path / "nfs")
    (tmp_path / "mountinfo").write_text(table)
    monkeypatch.setattr(filesystems, "_MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))


def test_a_store_on_nfs_is_said_once_and_the_ring_is_local(cluster, tmp_path, caplog):
    """Two runs, one warning with what to do; what they record lies on this machine first."""
    for _ in range(2):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        with Agent(optimizer) as agent:
            weight.grad = torch.ones(3)
            optimizer.step()
            assert agent._recording.channel.ring.path.is_relative_to(tmp_path / "local")
            assert agent.flush()
    (message,) = caplog.messages
    assert "network file system (nfs4)" in message
    assert "local disk (GRADWATCH_STORE), or use PostgreSQL" in message
    checks = [check for check in examine(Settings.load().store, {}) if check.status == "problem"]
    assert [check.subject for check in checks] == ["store"]
    assert "nfs4" in checks[0].detail


def test_a_local_store_has_its_rings_beside_it(tmp_path):
    """And a folder that the user chose is the folder, wherever it is."""
    assert rings.folders(Settings.load())[0] == tmp_path / "gradwatch.db.rings"
    assert rings.folders(Settings.load(ring_dir="/home/rings")) == [Path("/home/rings")]


@pytest.mark.parametrize("how", ["writable", "link", "somebody else's"])
def test_a_temporary_folder_that_others_can_write_holds_no_ring(tmp_path, monkeypatch, how):
    """Nobody else can plant a ring there, nor have this one's records put where they can be read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = tmp_path / "tmp" / f"gradwatch-rings-{os.getuid()}"
    folder.parent.mkdir()
    if how == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    if how == "somebody else's":
        folder.chmod(0o755)
        real = folder.lstat()
        monkeypatch.setattr(
            Path, "lstat", lambda _: os.stat_result([*real[:4], real.st_uid + 1, *real[5:]])
        )
    run = run_info()
    settings = Settings.load(store="postgresql+psycopg://host/store")
    told = []
    ring = rings.make(
        run, settings, parameters=[], durable=True, report=lambda _, message: told.append(message)
    )
    assert ring.path is None
    (message,) = told
    assert "not a folder that you alone can write; set GRADWATCH_RING_DIR" in message
    (found,) = recover(settings.store)
    assert "not a folder that you alone can write" in found.problem


def test_the_temporary_folder_is_ones_own(tmp_path, monkeypatch):
    """A run whose store is remote makes it, for itself alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = Settings.load(store="postgresql+psycopg://host/store")
    ring = rings.make(run_info(), settings, parameters=[], durable=True, report=print)
    assert stat.S_IMODE(ring.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(ring.path.stat().st_mode) == 0o600
    ring.close(remove=True)
