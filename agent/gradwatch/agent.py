"""`wrap` and `Agent`: the optimizer of a run, or several, instrumented in place."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import torch

from gradwatch import arguments
from gradwatch.arguments import NOT_GIVEN, NotGiven
from gradwatch.errors import AlreadyWrappedError, ConfigurationError, NotWrappedError
from gradwatch.fronts import watched_of
from gradwatch.names import ParameterNames
from gradwatch.notices import Notices
from gradwatch.policies import ClipNorm, Policy
from gradwatch.rounds import Rounds
from gradwatch.tape import NullTape, Tape
from gradwatch.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch import Tensor, nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from gradwatch.config import Settings
    from gradwatch.hooks import StepHooks
    from gradwatch.part import Part
    from gradwatch.records import RunStatus, StepRecord
    from gradwatch.sinks import Sink
    from gradwatch.treatment import OnNonFinite

__all__ = ["Agent", "wrap"]

_T = TypeVar("_T", bound="Optimizer | Sequence[Optimizer]")

DEFAULT_CLIP: Final = ClipNorm(1.0)
_ORIGIN_SECONDS = 1.0  # how long to wait for the store to say where a run goes on

_agents: weakref.WeakKeyDictionary[Optimizer, Agent] = weakref.WeakKeyDictionary()


def wrap(
    optimizer: _T,
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
) -> _T:
    """Clip, record and export every step of this optimizer; returns the same object.

    The loop stays as it was, except that its own `clip_grad_norm_` goes.

    Args:
        optimizer: any `torch.optim.Optimizer`, or what accelerate or Lightning put before one. A
            list of optimizers that step once each in a step of the job, in one order (Muon beside
            AdamW, or one a layer, stepped within the backward pass), is one run: its record of a
            step has the norm over all their gradients, and each optimizer clips its own by `clip`.
            A list needs `model`.
        clip: a policy over all parameters of an optimizer (one norm), or one for each of its
            parameter groups.
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
    """The handle on a wrapped optimizer, or on those of one run. Arguments as for `wrap`.

    The optimizer keeps its agent alive, not the other way round: a run ends when its optimizer
    is gone, when `close()` is called, at the end of a `with` block, or with the process.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
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
        arguments.model_and_scaler(model, scaler)
        optimizers = arguments.optimizers(optimizer, model)
        watched = [(of, arguments.parts(of.optimizer, clip)) for of in map(watched_of, optimizers)]
        for of, parts in watched:
            arguments.sparse(of.optimizer, model, parts)
            chosen_on_nonfinite = arguments.on_nonfinite(of.optimizer, parts, on_nonfinite)
        chosen = arguments.settings_of(
            settings, store, metrics_port, run=run, remote_control=remote_control
        )
        tags = arguments.tags(tags)
        for there in [_agents[of.optimizer] for of, _ in watched if of.optimizer in _agents]:
            if not replace:
                name = type(optimizers[0]).__name__
                msg = (
                    f"this {name} is wrapped already, as run {there.run_id}; "
                    "wrap it once, or say replace=True to begin a new run"
                )
                raise AlreadyWrappedError(msg)
            there.close()

        from gradwatch.recording import Recording  # noqa: PLC0415 - SQLAlchemy loads with it

        sink = store if store is not None and not isinstance(store, (str, Path)) else None
        recording = self._recording = Recording(chosen, sink, tags)
        pipeline = recording.pipeline
        self._closed = False
        self._watches = [
            Watch(
                of,
                parts,
                Notices(ParameterNames(model), chosen.layer_norms_every),
                pipeline,
                on_nonfinite=chosen_on_nonfinite,
                fold=chosen.fold,
                scaler=scaler,
                begin=self._begin,
                gone=self._gone,
            )
            for of, parts in watched
        ]
        self._hooks = self._watches[0].hooks  # of a run of one optimizer, all that there are
        self._rounds = (
            Rounds([watch.hooks for watch in self._watches], pipeline.troubles.report)
            if len(self._watches) > 1
            else None
        )
        pipeline.in_child(self._forked)
        for of, _ in watched:
            _agents[of.optimizer] = self

    @classmethod
    def of(cls, optimizer: Optimizer | Sequence[Optimizer]) -> Agent:
        """The agent of a wrapped optimizer. Raises `NotWrappedError` where there is none."""
        if isinstance(optimizer, Sequence) and optimizer:
            optimizer = optimizer[0]
        agent = _agents.get(watched_of(optimizer).optimizer)
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
        if isinstance(loss, torch.Tensor) and not loss.is_complex():
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
        except (TypeError, ValueError, RuntimeError):  # the latter of a complex tensor
            msg = f"log(loss={loss!r}): the loss is a number or a tensor of one element"
            raise ConfigurationError(msg) from None

    def clip(self) -> Tensor:
        """Clip now, in place, and return the norm before: what `clip_grad_norm_` was there for.

        For loops that want the norm in hand: between `backward()` (and `scaler.unscale_`) and
        `step()`. The step's hook then neither measures nor clips again; a non-finite gradient is
        dealt with at the step. Returns a 0-d tensor on the gradients' device. Goes on clipping once
        the agent is closed.
        """
        norms = [norm for watch in self._watches if (norm := watch.clip()) is not None]
        if not norms:
            return torch.tensor(math.nan)
        if len(norms) == 1:
            return norms[0]
        norm_type = self._hooks.parts[0].policy.norm_type
        total: Tensor = torch.linalg.vector_norm(
            torch.stack([norm.to(norms[0]) for norm in norms]), norm_type
        )
        return total

    @property
    def threshold(self) -> float:
        """The threshold in force; NaN where there is no single one."""
        return self._hooks.threshold if self._rounds is None else math.nan

    @property
    def last(self) -> StepRecord | None:
        """The last step's record, None before the first: for a progress bar.

        Its step is the run's, of a run that goes on as soon as the store has said where; until then
        steps are counted from the first of this process.
        """
        last = self._hooks.last if self._rounds is None else self._rounds.last
        if last is None or not (origin := self._recording.origin(_ORIGIN_SECONDS)):
            return last
        return last._replace(step=last.step + origin)

    # -- the run -------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The run's uid, under which `Store.run` finds it."""
        return self._recording.run_id

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus scrapes this process, None where nothing is exported."""
        return self._recording.metrics_url

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was recorded is stored; False where it was not in `timeout` s."""
        self._settle()
        return self._recording.flush(timeout)

    def close(self) -> None:
        """Store what is left, end the run as finished, and take the hooks off. Idempotent.

        Waits `Settings.close_timeout` seconds at most for the store.
        """
        self._end("finished")

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
        self._end("finished" if kind is None else "failed")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that a resumed job goes on as the same run: plain values."""
        self._settle()
        origin = self._recording.origin(_ORIGIN_SECONDS)
        return {
            "version": 1,
            "run_id": self.run_id,
            "step": self._hooks.step + (origin or 0),
            # Where the store has not said yet at which step of the run this process began.
            "counts_from": self._recording.counts_from if origin is None else "",
            # As text: distributed checkpoints take a dict apart, and lose what a fresh one lacks.
            "policies": json.dumps([part.dump() for part in self._parts]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run the state is from, at its step. Call it before the first step.

        Called later, it begins a new attempt of that run. Raises `ConfigurationError` where
        `state` is not from `state_dict`, or from other policies.
        """
        self._settle()
        loaded = arguments.loaded(state, self._parts)
        self._recording.resume(state["run_id"], state.get("counts_from", ""))
        for watch in self._watches:
            if (optimizer := watch.optimizer) is not None:
                watch.hooks.new_attempt(optimizer)
            watch.hooks.step = state["step"]
            count = len(watch.hooks.parts)
            watch.hooks.load(loaded[:count])
            loaded = loaded[count:]

    # -- beginning and ending ------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of it is None: it belongs to this process and this optimizer."""
        return _nothing, ()

    @property
    def _parts(self) -> list[Part]:
        return [part for watch in self._watches for part in watch.hooks.parts]

    def _begin(self, hooks: StepHooks) -> Tape:
        """At the first step of an optimizer: where it is recorded."""
        if self._rounds is None:
            return self._recording.begin(self._watches, self._settle)
        if self._recording.channel is None:
            self._rounds.on(self._recording.begin(self._watches, self._settle))
        return self._rounds.member(hooks)

    def _end(self, status: RunStatus) -> None:
        for watch in self._watches:
            if status == "failed":  # perhaps before its first step: that there was none is no news
                watch.unseen.seen()
            watch.unseen.end()
        if not self._closed:
            self._closed = True
            for watch in self._watches:
                if (optimizer := watch.optimizer) is not None:
                    _agents.pop(optimizer, None)
                watch.off()
            if self._rounds is not None:
                self._rounds.finish()
        # Of an optimizer that has gone before, the run ends already: wait for that all the same.
        self._recording.end(status)

    def _settle(self) -> None:
        """Put on record the last steps, where their numbers are on a device still."""
        for watch in self._watches:
            watch.settle()

    def _gone(self, hooks: StepHooks) -> None:
        """An optimizer is gone; with the last of them the run ends, stored in the worker's own time.

        The garbage collector calls this, in any thread and in the middle of anything: no lock is
        taken here, the worker's wake-up included.
        """
        if self._closed:
            return
        hooks.settle(None)
        if all(watch.optimizer is None for watch in self._watches):
            self._closed = True
            if self._rounds is not None:
                self._rounds.finish()
            self._recording.let_end()

    def _forked(self) -> None:
        """In a forked child: go on clipping, record nothing, touch nothing of the parent's."""
        self._recording.forked()
        for watch in self._watches:
            watch.hooks.forked(NullTape())


def _nothing() -> None:
    """What a pickled or copied agent becomes."""
