"""The lock on a ring's file, by which others see that its process lives."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys

__all__ = ["held", "holder", "lock", "release"]

# The rings that this process holds, by device and inode: the lock is the process's, and closing
# any descriptor of such a file would let go of it.
held: set[tuple[int, int]] = set()


def lock(descriptor: int) -> bool:
    """Take a ring for this process, until it ends or lets go; False: the file system has no locks.

    Raises `OSError` where another process has it.
    """
    locked = True
    try:
        # lockf, not flock: a forked child does not hold on to it after we are killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            raise
        locked = False
    found = os.fstat(descriptor)
    held.add((found.st_dev, found.st_ino))
    return locked


def holder(descriptor: int) -> int | None:
    """The process that has a ring, 0 where it is not of this machine; None: nobody has it.

    Asks without taking it, which only Linux is asked for: elsewhere it is None.
    """
    if sys.platform != "linux":
        return None
    question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        kind, _, _, _, pid = struct.unpack(
            "hhqqi", fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
        )
    except OSError:  # a file system without locks
        return None
    return None if kind == fcntl.F_UNLCK else max(0, pid)


def release(descriptor: int) -> None:
    """Let go of a ring that `lock` took."""
    found = os.fstat(descriptor)
    # Before: another file may have this inode as soon as it is closed.
    held.discard((found.st_dev, found.st_ino))
    os.close(descriptor)
