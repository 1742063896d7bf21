"""One agent's run on record: who it is, its flight recorder, its way to the sinks."""

from __future__ import annotations

import dataclasses
import os
import uuid
import weakref
from typing import TYPE_CHECKING, Any

from gradwatch import arguments, channel, identity, process, rings
from gradwatch.config import unknown_variables
from gradwatch.control import control_of
from gradwatch.peers import Peers
from gradwatch.records import RunInfo
from gradwatch.sinks import NullSink
from gradwatch.tape import NullTape, Tape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gradwatch.channel import Channel
    from gradwatch.config import Settings
    from gradwatch.identity import UidSource
    from gradwatch.pipeline import Pipeline
    from gradwatch.records import RunStatus
    from gradwatch.sinks import Sink
    from gradwatch.watch import Watch

__all__ = ["Recording"]


class Recording:
    """The run of one optimizer, from its first step on; one attempt after another."""

    def __init__(self, settings: Settings, sink: Sink | None, tags: Mapping[str, Any]) -> None:
        self.settings = settings
        self.pipeline: Pipeline = process.pipeline()
        for name in unknown_variables(os.environ):
            self.pipeline.troubles.report(
                name,
                f"{name} is no setting and does nothing; `gradwatch doctor` lists those there are",
            )
        self.channel: Channel | None = None  # the attempt under way
        self._sink = sink
        self._tags = tags
        self._uid, self._uid_source = self._choose_uid()
        self.pipeline.ids.opened(self._uid)
        self._after: str | None = None  # a ring whose count goes on, where a loaded state says so
        self._on = not settings.disabled
        self._incomplete = False  # steps were taken that nothing will ever store
        self._ordinal = self.pipeline.next_run()
        self._attempts = 0
        exports = self._on and identity.rank_and_world(os.environ)[0] == 0
        self.metrics_url = self.pipeline.export(settings) if exports else None

    @property
    def run_id(self) -> str:
        """The run's uid, under which the store knows it."""
        return self._uid if self.channel is None else self.channel.run.uid

    def origin(self, timeout: float) -> int | None:
        """What is to be added to the hooks' step numbers to have the run's; None: not known yet.

        Waits for the store to say so, `timeout` seconds at most.
        """
        return 0 if self.channel is None else self.channel.origin(timeout)

    @property
    def counts_from(self) -> str:
        """The ring from whose beginning the hooks count, where its own place is not known; or ""."""
        if self.channel is None or self.channel.origin(0.0) is not None:
            return ""
        return self.channel.run.after or self.channel.run.ring

    def begin(self, watches: Sequence[Watch], settle: Callable[[], None]) -> Tape:
        """At the first step of an attempt: its tape; where none can be made, one that keeps nothing.

        `settle`, a bound method that is held weakly, puts the last steps on the tape.
        """
        try:
            return self._open(watches, weakref.WeakMethod(settle))
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._incomplete = True
            self.pipeline.troubles.report(
                "begin", f"nothing is recorded ({type(error).__name__}: {error})"
            )
            return NullTape()

    def resume(self, uid: str, after: str = "") -> None:
        """Go on as the run of that uid, in a further attempt; another that is under way ends.

        `after` is a ring whose count the coming step goes on from, if it is not the run's.
        """
        if self.channel is not None:
            status: RunStatus | None = None if self.channel.run.uid == uid else "finished"
            self.end(status)
            self.channel = None
        self.pipeline.ids.closed(self._uid)
        self._uid, self._uid_source, self._after = uid, "state", after or None
        self.pipeline.ids.opened(uid)

    def flush(self, timeout: float) -> bool:
        """Whether all that was recorded is stored, after `timeout` seconds at most."""
        if self.channel is None:
            return not self._incomplete
        return self.pipeline.flush(self.channel, timeout)

    def end(self, status: RunStatus | None) -> None:
        """Store what is left, within `close_timeout` seconds, and end the run."""
        self.pipeline.ids.closed(self._uid)
        if self.channel is not None:
            self.pipeline.close(self.channel, status, self.settings.close_timeout)

    def let_end(self) -> None:
        """The same as finished, in the worker's own time; takes no lock."""
        self.pipeline.ids.closed(self._uid)
        if self.channel is not None:
            self.pipeline.let_end(self.channel)

    def forked(self) -> None:
        """In a forked child: record nothing, touch nothing of the parent's."""
        self._on = False
        self.channel = None
        self.metrics_url = None

    def _open(
        self,
        watches: Sequence[Watch],
        settle: weakref.WeakMethod[Callable[[], None]],
    ) -> Tape:
        rank, world_size = identity.rank_and_world(os.environ)
        for watch in watches:
            notices = watch.hooks.notices
            notices.rank, notices.alone = rank, world_size == 1
        self._attempts += 1
        peers = Peers.of(self._ordinal, self._attempts) if world_size > 1 else None
        if not self._on or (rank != 0 and peers is None):
            return NullTape()
        run = RunInfo(
            uid=self.run_id,
            uid_source=self._uid_source,
            name=self.settings.run or identity.default_name(),
            job=self.pipeline.job.id,
            ring=uuid.uuid4().hex,
            host=identity.host(),
            pid=os.getpid(),
            rank=rank,
            world_size=world_size,
            started_at=self.pipeline.clock.time(),
            start_step=watches[0].hooks.step,
            metrics_url=self.metrics_url,
            tags=self._tags,
            settings=arguments.describe(watches, self.settings),
            counter=arguments.counter(watches[0].optimizer),
            after=self._after,
        )
        names = [name for watch in watches for name in watch.introduce()]
        ring = rings.make(
            run,
            self.settings,
            parameters=names,
            ordinal=self._ordinal,
            durable=self._sink is None,
            report=self.pipeline.troubles.report,
        )
        control = None
        if self.settings.remote_control and len(watches) == 1:
            control = control_of(watches[0].hooks.parts, peers, rank, world_size)
        elif self.settings.remote_control:
            self.pipeline.troubles.report(
                "remote control",
                f"remote_control is off for a run of {len(watches)} optimizers, each of which clips by "
                "a threshold of its own: wrap them one by one to apply thresholds while they run",
            )
        known = {
            "ring": str(ring.path) if ring.path else None,
            "remote_control": control is not None,
        }
        run = dataclasses.replace(run, settings={**run.settings, **known})
        if peers is not None and rank == 0:
            peers.lead(run.ring)
        self.channel = channel.Channel(
            run,
            ring,
            self._sink or self.pipeline.store_sink(self.settings.store),
            self.pipeline.metrics if self.metrics_url else NullSink(),
            parameters=lambda: names,
            peers=peers,
            control=control,
            settle=lambda: (method := settle()) and method(),
        )
        for watch in watches:
            watch.hooks.notices.origin = self.channel.origin
        self._tell_uid()
        self.pipeline.attach(self.channel, self.settings)
        return self.channel

    def _choose_uid(self) -> tuple[str, UidSource]:
        asked_for, ids = self.settings.run_id, self.pipeline.ids
        # In the environment it names the process, whose optimizers are runs of their own.
        names_process = asked_for is None or asked_for == os.environ.get("GRADWATCH_RUN_ID")
        ordinal = ids.next if names_process else ids.free
        return identity.run_uid(self.pipeline.job, setting=asked_for, ordinal=ordinal)

    def _tell_uid(self) -> None:
        """Where this is not the first run of the process under the id that was asked for."""
        asked_for = self.settings.run_id
        if self._uid_source == "setting" and asked_for != self._uid:
            self.pipeline.troubles.report(
                f"id {self._uid}",
                f"run id {asked_for!r} is that of another optimizer of this process: the run of this "
                f"one has the id {self._uid!r}",
            )
