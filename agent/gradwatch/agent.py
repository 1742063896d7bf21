"""`wrap` and `Agent`: one optimizer instrumented in place, through torch's own step hooks."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch

from gradwatch import arguments
from gradwatch.amp import ScalerWatch
from gradwatch.arguments import NOT_GIVEN, NotGiven
from gradwatch.errors import AlreadyWrappedError, ConfigurationError, NotWrappedError
from gradwatch.frames import outer_of_step
from gradwatch.fronts import watched_of
from gradwatch.guard import guard, unguard
from gradwatch.hooks import StepHooks
from gradwatch.kernels import KernelStep
from gradwatch.names import ParameterNames
from gradwatch.notices import Notices
from gradwatch.policies import ClipNorm, Policy
from gradwatch.tape import NullTape, Tape
from gradwatch.two_pass import TwoPass
from gradwatch.unseen import Unseen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from torch import Tensor, nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from gradwatch.config import Settings
    from gradwatch.records import RunStatus, StepRecord
    from gradwatch.sinks import Sink
    from gradwatch.treatment import OnNonFinite

__all__ = ["Agent", "wrap"]


DEFAULT_CLIP: Final = ClipNorm(1.0)
_ORIGIN_SECONDS = 1.0  # how long to wait for the store to say where a run goes on

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
        optimizer: any `torch.optim.Optimizer`, or what accelerate or Lightning put before one.
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
        optimizer, two_pass = watched_of(optimizer)
        parts = arguments.parts(optimizer, clip)
        arguments.model_and_scaler(model, scaler)
        arguments.sparse(optimizer, model, parts)
        on_nonfinite = arguments.on_nonfinite(optimizer, parts, on_nonfinite)
        chosen = arguments.settings_of(
            settings, store, metrics_port, run=run, remote_control=remote_control
        )
        tags = arguments.tags(tags)
        if (there := _agents.get(optimizer)) is not None:
            if not replace:
                msg = (
                    f"this {type(optimizer).__name__} is wrapped already, as run {there.run_id}; "
                    "wrap it once, or say replace=True to begin a new run"
                )
                raise AlreadyWrappedError(msg)
            there.close()

        from gradwatch.recording import Recording  # noqa: PLC0415 - SQLAlchemy loads with it

        sink = store if store is not None and not isinstance(store, (str, Path)) else None
        recording = self._recording = Recording(chosen, sink, tags)
        pipeline = recording.pipeline
        self._optimizer = weakref.ref(optimizer)
        self._closed = False
        self._hooks = StepHooks(
            optimizer,
            parts,
            Notices(ParameterNames(model), chosen.layer_norms_every),
            on_nonfinite=on_nonfinite,
            fold=chosen.fold,
            clock=pipeline.clock,
            start=self._begin,
            report=pipeline.troubles.report,
        )
        self._scaler = ScalerWatch.on(scaler, optimizer, self._hooks) if scaler else None
        if self._scaler is not None:
            self._hooks.scaler = self._scaler
        before, after = self._hooks.before, self._hooks.after
        # A class that is only used like an optimizer has no hooks: the guard calls ours.
        has_hooks = hasattr(optimizer, "_optimizer_step_pre_hooks")
        self._handles = (
            (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))
            if has_hooks
            else ()
        )
        # No kernel where a run is to be as torch's own, to the letter.
        kernel = KernelStep.of(optimizer, before, after) if chosen.fold else None
        guard(optimizer, self._hooks, kernel)
        self._two_pass = (
            TwoPass.around(two_pass, self._hooks, pipeline.troubles.report)
            if two_pass is not None
            else None
        )
        self._unseen = Unseen(optimizer, pipeline.troubles.report)
        pipeline.await_step(self._unseen)
        pipeline.in_child(self._forked)
        # The pipeline ends every run at exit; this one is for an optimizer that goes before.
        self._finalizer = weakref.finalize(optimizer, self._optimizer_is_gone)
        self._finalizer.atexit = False
        _agents[optimizer] = self

    @classmethod
    def of(cls, optimizer: Optimizer) -> Agent:
        """The agent of a wrapped optimizer. Raises `NotWrappedError` where there is none."""
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
        """The last step's record, None before the first: for a progress bar.

        Its step is the run's, of a run that goes on as soon as the store has said where; until then
        steps are counted from the first of this process.
        """
        last = self._hooks.last
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
        """Store what is left, end the run as finished, and take the hooks off. Idempotent."""
        self._end("finished", arguments.CLOSE_SECONDS)

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
        self._end("finished" if kind is None else "failed", arguments.CLOSE_SECONDS)

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
            "policies": json.dumps([part.dump() for part in self._hooks.parts]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run the state is from, at its step. Call it before the first step.

        Called later, it begins a new attempt of that run. Raises `ConfigurationError` where
        `state` is not from `state_dict`, or from other policies.
        """
        self._settle()
        loaded = arguments.loaded(state, self._hooks.parts)
        self._recording.resume(state["run_id"], state.get("counts_from", ""))
        if (optimizer := self._optimizer()) is not None:
            self._hooks.new_attempt(optimizer)
        self._hooks.step = state["step"]
        self._hooks.load(loaded)

    # -- beginning and ending ------------------------------------------------------------------

    def _begin(self, optimizer: Optimizer) -> Tape:
        """At the first step: where it is recorded."""
        self._unseen.seen()
        if self._two_pass is None and (outer := outer_of_step(optimizer)) is not None:
            ours, theirs = type(optimizer).__name__, type(outer).__name__
            self._recording.pipeline.troubles.report(
                "outer",
                f"step() of the wrapped {ours} is called by the step() of {theirs}: what {theirs} does "
                "to the gradient before it is recorded as well, and what it does to the weights is not "
                f"left out where a step is skipped. Wrap the {theirs} instead",
            )
        return self._recording.begin(optimizer, self._hooks, self._settle)

    def _end(self, status: RunStatus, timeout: float) -> None:
        if status == "failed":  # perhaps before its first step: that there was none is no news
            self._unseen.seen()
        self._unseen.end()
        if not self._closed:
            self._closed = True
            self._let_go()
        # Of an optimizer that has gone before, the run ends already: wait for that all the same.
        self._recording.end(status, timeout)

    def _let_go(self) -> None:
        """Off the optimizer, with hooks and all."""
        self._finalizer.detach()
        if self._two_pass is not None:
            self._two_pass.off()
        for handle in self._handles:
            handle.remove()
        if (optimizer := self._optimizer()) is not None:
            _agents.pop(optimizer, None)
            unguard(optimizer)
            self._hooks.new_attempt(optimizer, NullTape())
            if self._scaler is not None:
                self._scaler.off(optimizer)

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
            self._recording.let_end()

    def _forked(self) -> None:
        """In a forked child: go on clipping, record nothing, touch nothing of the parent's."""
        self._recording.forked()
        self._hooks.forked(NullTape())
