"""The one pipeline of this process: made when first asked for, ended at exit, left at a fork."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING

from gradwatch.pipeline import Pipeline

if TYPE_CHECKING:
    from gradwatch.records import RunStatus

__all__ = ["pipeline"]


class _Process:
    """What this process has one of."""

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None
        self.lock = threading.Lock()
        self.hooked = False
        self.left_behind: list[Pipeline] = []

    def at_exit(self) -> None:
        if self.pipeline is not None:
            # The interpreter is going down: nobody is left to tell.
            with contextlib.suppress(Exception):
                self.pipeline.shutdown(_exit_status(), exiting=True, died=_died())
            _stay_interrupted()

    def before_fork(self) -> None:
        if self.pipeline is not None:
            self.pipeline.before_fork()

    def in_parent(self) -> None:
        if self.pipeline is not None:
            self.pipeline.after_fork()

    def in_child(self) -> None:
        self.lock = threading.Lock()  # the parent's may have been held at the fork
        parents, self.pipeline = self.pipeline, None
        if parents is not None:
            parents.forked()
            # Kept for good: a connection that is collected here may write to the parent's file.
            self.left_behind.append(parents)


_process = _Process()


def pipeline() -> Pipeline:
    """The process's pipeline."""
    with _process.lock:
        if _process.pipeline is None:
            _process.pipeline = Pipeline()
        if not _process.hooked:
            _process.hooked = True
            atexit.register(_process.at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(
                    before=_process.before_fork,
                    after_in_parent=_process.in_parent,
                    after_in_child=_process.in_child,
                )
        return _process.pipeline


def _exit_status() -> RunStatus:
    """Failed where an uncaught exception ends the program; a prompt's last error does not."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return "failed" if error is not None and not hasattr(sys, "ps1") else "finished"


def _died() -> bool:
    """Whether the program ends as nobody wanted it to: who presses Ctrl-C knows of it."""
    interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
    return _exit_status() == "failed" and not interrupted


def _stay_interrupted() -> None:
    """Let a program that Ctrl-C ended still die of SIGINT, as its parent expects.

    The interpreter forgets that it was interrupted whenever a text is executed as a program, and
    libraries (named tuples, SQLAlchemy) do so while the last records are stored. It learns it in
    the same way: `run_eval_code_obj` in CPython's pythonrun.c.
    """
    if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt) and not hasattr(sys, "ps1"):
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102 - a constant
