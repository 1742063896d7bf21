"""`wrap` and `Agent`: one optimizer instrumented in place, through torch's own step hooks."""

from __future__ import annotations

import dataclasses
import math
import os
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch

from gradwatch import arguments, identity
from gradwatch.amp import ScalerWatch
from gradwatch.arguments import NOT_GIVEN, NotGiven
from gradwatch.control import control_of
from gradwatch.errors import AlreadyWrappedError, ConfigurationError, NotWrappedError
from gradwatch.hooks import StepHooks
from gradwatch.names import ParameterNames
from gradwatch.notices import Notices
from gradwatch.peers import Peers
from gradwatch.policies import ClipNorm, Policy
from gradwatch.records import RunInfo
from gradwatch.sinks import NullSink
from gradwatch.tape import NullTape, Tape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from torch import Tensor, nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from gradwatch.channel import Channel
    from gradwatch.config import Settings
    from gradwatch.identity import UidSource
    from gradwatch.pipeline import Pipeline
    from gradwatch.records import RunStatus, StepRecord
    from gradwatch.sinks import Sink
    from gradwatch.treatment import OnNonFinite

__all__ = ["Agent", "wrap"]


DEFAULT_CLIP: Final = ClipNorm(1.0)
CLOSE_SECONDS = 5.0

_agents: weakref.WeakKeyDictionary[Optimizer, Agent] = weakref.WeakKeyDictionary()


def wrap(
    optimizer: Optimizer,
    *,
    clip: Policy[Any] | Sequence[Policy[Any]] = DEFAULT_CLIP,
    model: nn.Module | None = None,
    run: str | None = None,
    tags: Mapping[str, Any] | None = None,
    store: str | Sink | None = None,
    metrics_port: int | str | NotGiven | None = NOT_GIVEN,
    on_nonfinite: OnNonFinite = "skip",
    scaler: GradScaler | None = None,
    replace: bool = False,
    remote_control: bool | None = None,
    settings: Settings | None = None,
) -> Optimizer:
    """Clip, record and export every step of this optimizer; returns the same object.

    The loop stays as it was, except that its own `clip_grad_norm_` goes.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        clip: a policy over all parameters (one global norm), or one for each parameter group.
        model: names the parameters in alerts, in the order of the layers.
        run: the run's name; default: the script's. A name that a live run has gets `-2`.
        tags: your own facts about the run (JSON-able): hyper-parameters, commit, data set.
        store: where records go: an SQLAlchemy URL or a file's path; default
            `sqlite:///gradwatch.db`. Or a `Sink`, as `gradwatch.testing.MemorySink`.
        metrics_port: TCP port for Prometheus (default 9495, or the next free one), 0 for any,
            None for no exporter.
        on_nonfinite: what to do with a step whose gradient holds NaN or inf: "skip" it
            (parameters and optimizer state untouched), "raise" `NonFiniteGradientError`, or
            "ignore" it (apply it, unclipped).
        scaler: the `GradScaler` of the loop, so that overflows it hides are on record too.
        replace: take the place of an agent that is there (a notebook cell run again).
        remote_control: whether `gradwatch apply` may change the threshold while the run goes on;
            default: no.
        settings: `gradwatch.Settings`; arguments come before it, the environment after.

    Raises:
        ConfigurationError: an argument or a GRADWATCH_* variable is wrong.
        AlreadyWrappedError: the optimizer has an agent, and `replace` is False.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    >>> from gradwatch.testing import MemorySink
    >>> wrap(optimizer, model=model, store=MemorySink(), metrics_port=None) is optimizer
    True
    """
    Agent(
        optimizer,
        clip=clip,
        model=model,
        run=run,
        tags=tags,
        store=store,
        metrics_port=metrics_port,
        on_nonfinite=on_nonfinite,
        scaler=scaler,
        replace=replace,
        remote_control=remote_control,
        settings=settings,
    )
    return optimizer


class Agent:
    """The handle on one wrapped optimizer. Arguments as for `wrap`.

    The optimizer keeps its agent alive, not the other way round: a run ends when its optimizer
    is gone, when `close()` is called, at the end of a `with` block, or with the process.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        clip: Policy[Any] | Sequence[Policy[Any]] = DEFAULT_CLIP,
        model: nn.Module | None = None,
        run: str | None = None,
        tags: Mapping[str, Any] | None = None,
        store: str | Sink | None = None,
        metrics_port: int | str | NotGiven | None = NOT_GIVEN,
        on_nonfinite: OnNonFinite = "skip",
        scaler: GradScaler | None = None,
        replace: bool = False,
        remote_control: bool | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Instrument the optimizer; see `wrap`."""
        parts = arguments.parts(optimizer, clip)
        arguments.model_and_scaler(model, scaler)
        arguments.sparse(optimizer, model, parts)
        on_nonfinite = arguments.on_nonfinite(optimizer, parts, on_nonfinite)
        self._settings = arguments.settings_of(
            settings, store, metrics_port, run=run, remote_control=remote_control
        )
        self._tags = arguments.tags(tags)
        if (there := _agents.get(optimizer)) is not None:
            if not replace:
                msg = (
                    f"this {type(optimizer).__name__} is wrapped already, as run {there.run_id}; "
                    "wrap it once, or say replace=True to begin a new run"
                )
                raise AlreadyWrappedError(msg)
            there.close()

        from gradwatch import process  # noqa: PLC0415 - SQLAlchemy and the exporter load here

        self._pipeline: Pipeline = process.pipeline()
        self._sink = store if store is not None and not isinstance(store, (str, Path)) else None
        self._optimizer = weakref.ref(optimizer)
        self._uid: str | None = None
        self._uid_source: UidSource = "fresh"
        self._channel: Channel | None = None
        self._closed = False
        self._recording = not self._settings.disabled
        self._unrecorded = False  # steps were taken that nothing will ever store
        self._ordinal = self._pipeline.next_run()
        self._attempts = 0
        exports = self._recording and identity.rank_and_world(os.environ)[0] == 0
        self._metrics_url = self._pipeline.export(self._settings) if exports else None
        self._hooks = StepHooks(
            optimizer,
            parts,
            Notices(ParameterNames(model), self._settings.layer_norms_every),
            on_nonfinite=on_nonfinite,
            fold=self._settings.fold,
            clock=self._pipeline.clock,
            start=self._begin_attempt,
            report=self._pipeline.troubles.report,
        )
        self._scaler = ScalerWatch.on(scaler, optimizer, self._hooks) if scaler else None
        if self._scaler is not None:
            self._hooks.scaler = self._scaler
        self._handles = (
            optimizer.register_step_pre_hook(self._hooks.before),
            optimizer.register_step_post_hook(self._hooks.after),
        )
        self._pipeline.in_child(self._forked)
        # The pipeline ends every run at exit; this one is for an optimizer that goes before.
        self._finalizer = weakref.finalize(optimizer, self._optimizer_is_gone)
        self._finalizer.atexit = False
        _agents[optimizer] = self

    @classmethod
    def of(cls, optimizer: Optimizer) -> Agent:
        """The agent of a wrapped optimizer. Raises `NotWrappedError` where there is none."""
        agent = _agents.get(optimizer)
        if agent is None:
            msg = f"this {type(optimizer).__name__} is not wrapped: call gradwatch.wrap first"
            raise NotWrappedError(msg)
        return agent

    # -- around a step -------------------------------------------------------------------------

    def log(self, *, loss: Tensor | float) -> None:
        """Attach the loss to the coming step; call it before `step()`.

        Takes a tensor of one element without waiting for the device, or a number.
        Raises `ConfigurationError` for anything else.
        """
        if isinstance(loss, torch.Tensor):
            if loss.numel() != 1:
                msg = (
                    f"log(loss=…): a tensor of shape {tuple(loss.shape)} is not one loss; "
                    "right would be loss.mean()"
                )
                raise ConfigurationError(msg)
            # By value: the loop may write into this memory before the step.
            self._hooks.loss = loss.item() if loss.is_cpu else loss.detach().clone()
            return
        try:
            self._hooks.loss = float(loss)
        except (TypeError, ValueError):
            msg = f"log(loss={loss!r}): the loss is a number or a tensor of one element"
            raise ConfigurationError(msg) from None

    def clip(self) -> Tensor:
        """Clip now, in place, and return the norm before: what `clip_grad_norm_` was there for.

        For loops that want the norm in hand: between `backward()` (and `scaler.unscale_`) and
        `step()`. The step's hook then neither measures nor clips again; a non-finite gradient is
        dealt with at the step. Returns a 0-d tensor on the gradients' device. Goes on clipping once
        the agent is closed.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return torch.tensor(math.nan)
        if self._scaler is not None:
            self._scaler.unscale(optimizer)
        return self._hooks.clip(optimizer)

    @property
    def threshold(self) -> float:
        """The threshold in force; NaN for policies that have no single one."""
        return self._hooks.threshold

    @property
    def last(self) -> StepRecord | None:
        """The last step's record, None before the first: for a progress bar."""
        return self._hooks.last

    # -- the run -------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The run's uid, under which `Store.run` finds it."""
        if self._channel is not None:
            return self._channel.run.uid
        if self._uid is None:
            self._uid, self._uid_source = identity.run_uid(
                self._pipeline.job,
                setting=self._settings.run_id,
                ordinal=self._ordinal,
            )
        return self._uid

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus scrapes this process, None where nothing is exported."""
        return self._metrics_url

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was recorded is stored; False where it was not in `timeout` s."""
        self._settle()
        if self._channel is None:
            return not self._unrecorded
        return self._pipeline.flush(self._channel, timeout)

    def close(self) -> None:
        """Store what is left, end the run as finished, and take the hooks off. Idempotent."""
        self._end("finished", CLOSE_SECONDS)

    def __enter__(self) -> Self:
        """Use the agent as a context; it closes at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; the run has failed where an exception ends the block."""
        self._end("finished" if kind is None else "failed", CLOSE_SECONDS)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that a resumed job goes on as the same run: plain values."""
        self._settle()
        return {
            "version": 1,
            "run_id": self.run_id,
            "step": self._hooks.step,
            "policies": [part.dump() for part in self._hooks.parts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run the state is from, at its step. Call it before the first step.

        Called later, it begins a new attempt of that run. Raises `ConfigurationError` where
        `state` is not from `state_dict`, or from other policies.
        """
        self._settle()
        loaded = arguments.loaded(state, self._hooks.parts)
        if self._channel is not None:
            same = self._channel.run.uid == state["run_id"]
            self._pipeline.close(self._channel, None if same else "finished", CLOSE_SECONDS)
            self._channel = None
        if (optimizer := self._optimizer()) is not None:
            self._hooks.new_attempt(optimizer)
        self._hooks.step = state["step"]
        self._hooks.load(loaded)
        self._uid, self._uid_source = state["run_id"], "state"

    # -- beginning and ending ------------------------------------------------------------------

    def _begin_attempt(self, optimizer: Optimizer) -> Tape:
        """At the first step: the channel, or where none can be made the null tape, said once."""
        try:
            return self._open_channel(optimizer)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._unrecorded = True
            self._pipeline.troubles.report(
                "begin", f"nothing is recorded ({type(error).__name__}: {error})"
            )
            return NullTape()

    def _open_channel(self, optimizer: Optimizer) -> Tape:
        """Who the run is, its ring, its way to the sinks."""
        rank, world_size = identity.rank_and_world(os.environ)
        self._hooks.notices.rank, self._hooks.notices.alone = rank, world_size == 1
        self._attempts += 1
        peers = Peers.of(self._ordinal, self._attempts) if world_size > 1 else None
        if not self._recording or (rank != 0 and peers is None):
            return NullTape()
        from gradwatch import channel, rings  # noqa: PLC0415 - see __init__

        run = RunInfo(
            uid=self.run_id,
            uid_source=self._uid_source,
            name=self._settings.run or identity.default_name(),
            job=self._pipeline.job.id,
            ring=uuid.uuid4().hex,
            host=identity.host(),
            pid=os.getpid(),
            rank=rank,
            world_size=world_size,
            started_at=self._pipeline.clock.time(),
            start_step=self._hooks.step,
            metrics_url=self._metrics_url,
            tags=self._tags,
            settings=arguments.describe(optimizer, self._hooks, self._settings),
        )
        ring = rings.make(
            run,
            self._settings,
            parameters=self._hooks.notices.named(optimizer),
            durable=self._sink is None,
            report=self._pipeline.troubles.report,
        )
        run = dataclasses.replace(
            run, settings={**run.settings, "ring": str(ring.path) if ring.path else None}
        )
        if peers is not None and rank == 0:
            peers.lead(run.ring)
        control = None
        if self._settings.remote_control:
            control = control_of(self._hooks.parts, peers, rank, world_size)
        store = self._sink or self._pipeline.store_sink(self._settings.store)
        metrics = self._pipeline.metrics if self._metrics_url else NullSink()
        settling = weakref.WeakMethod(self._settle)
        self._channel = channel.Channel(
            run,
            ring,
            store,
            metrics,
            notices=self._hooks.notices,
            peers=peers,
            control=control,
            settle=lambda: (method := settling()) and method(),
        )
        self._pipeline.attach(self._channel, self._settings)
        return self._channel

    def _end(self, status: RunStatus, timeout: float) -> None:
        if self._closed:
            return
        self._closed = True
        self._finalizer.detach()
        for handle in self._handles:
            handle.remove()
        if (optimizer := self._optimizer()) is not None:
            _agents.pop(optimizer, None)
            self._hooks.new_attempt(optimizer, NullTape())
            if self._scaler is not None:
                self._scaler.off(optimizer)
        if self._channel is not None:
            self._pipeline.close(self._channel, status, timeout)

    def _settle(self) -> None:
        """Put on record the last steps, where their numbers are on a device still."""
        self._hooks.settle(self._optimizer())

    def _optimizer_is_gone(self) -> None:
        """The run ends, stored in the worker's own time.

        The garbage collector calls this, in any thread and in the middle of anything: no lock is
        taken here, the worker's wake-up included.
        """
        if not self._closed:
            self._closed = True
            self._hooks.settle(None)
            if self._channel is not None:
                self._pipeline.let_end(self._channel)

    def _forked(self) -> None:
        """In a forked child: go on clipping, record nothing, touch nothing of the parent's."""
        self._recording = False
        self._channel = None
        self._metrics_url = None
        self._hooks.forked(NullTape())
