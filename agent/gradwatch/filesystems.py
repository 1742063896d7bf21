"""Which kind of file system a path is on: SQLite and the flight recorder want a local one."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

__all__ = ["advice", "kind_of", "network_kind"]

_MOUNTS = Path("/proc/self/mountinfo")
# As it calls them; fuse.sshfs and the like by what follows the dot.
_NETWORK = frozenset({
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "davfs2", "gcsfuse", "geesefs",
    "glusterfs", "gpfs", "grpcfuse", "juicefs", "lustre", "mount-s3", "mountpoint-s3", "ncpfs",
    "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "rclone", "s3fs", "smb2", "smb3", "smbfs", "sshfs",
    "wekafs",
})  # fmt: skip


def network_kind(path: Path) -> str | None:
    """The kind of the network file system that `path` is, or will be, on; None: it is local.

    None also where that cannot be told: on systems without /proc/self/mountinfo.
    """
    with contextlib.suppress(OSError, ValueError):
        mounts = _MOUNTS.read_text("utf-8", "surrogateescape")
        kind = kind_of(os.path.realpath(path), mounts)
        if kind is not None and kind.removeprefix("fuse.") in _NETWORK:
            return kind
    return None


def advice(store: str, kind: str) -> str:
    """What to do about an SQLite store on a network file system."""
    return (
        f"{store} is on a network file system ({kind}), where SQLite cannot keep a database safe "
        "that several machines write: put the store on a local disk (GRADWATCH_STORE), or use "
        "PostgreSQL"
    )


def kind_of(path: str, mountinfo: str) -> str | None:
    """The kind of file system that an absolute path is on, by the text of a mountinfo file.

    Of the mounts that hold the path the deepest counts, and of those at one place the last
    (proc_pid_mountinfo(5): the mount point is the fifth field, the kind the first after " - ").
    """
    found, depth = None, -1
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = point in {"/", path} or path.startswith(f"{point}/")
        if inside and len(point) >= depth:
            found, depth = after.split(" ")[0], len(point)
    return found
