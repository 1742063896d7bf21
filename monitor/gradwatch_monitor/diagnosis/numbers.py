"""Numbers that are none, gradients of 0 or absent, and a loss scaler in trouble."""

from __future__ import annotations

import numpy as np

from gradwatch_monitor.diagnosis.window import Array, Flags, Rule, Sign, Window

__all__ = [
    "RULES",
    "dead_gradient",
    "loss_scale_trouble",
    "no_gradient",
    "nonfinite_gradient",
    "nonfinite_loss",
    "nonfinite_weights",
]

_RECENT = 200  # steps after which what was seen counts no longer
_FOR_GOOD = 10  # losses in a row that are NaN: it does not recover by itself
_RUN_UP = 50  # steps in which a loss may have run away before it is NaN
# A loop may leave backward() out now and then; one that alternates does so in every second step. It is
# a fault where the greater part of so many steps has no gradient, or each of the last steps.
_GREATER_PART, _OF_STEPS = 0.55, 200
_IN_A_ROW, _FROM_THE_START = 500, 10
_OVERFLOWS = 0.05  # of the steps; a scaler that looks for its scale doubles it every 2,000 steps


def nonfinite_loss(window: Window) -> Sign | None:
    """The loss was NaN or inf within the last 200 steps."""
    recent = window.last(_RECENT)
    count = int(recent.nonfinite_loss.sum())
    if not count or _are_of_weights(recent, recent.nonfinite_loss):
        return None
    first, last = recent.span(recent.nonfinite_loss)
    ever_since = _unbroken(window)
    if ever_since is None:
        said, anew = f"in {count} of the last {len(recent)} steps", ""
    else:
        first = int(window.step[ever_since])
        more = len(window) - ever_since
        said = (
            f"in every step since step {first:,}"
            if ever_since
            else f"in all of the last {more:,} steps"
        )
        if window.skipped[ever_since:].all():
            anew = " These steps were skipped: the weights are still those from before them."
        else:
            bad = int(window.step[_runs_away(window.loss, ever_since)])
            anew = f" Go on from a checkpoint before step {bad:,}." if ever_since and bad else ""
    return Sign(
        "nonfinite_loss", "critical", float(count), (first, last),
        f"the loss was NaN or inf {said}",
        "It came from the forward pass or the data: look at the first such step's batch, at "
        "divisions, logarithms and square roots of 0, and at the learning rate if the loss grew "
        f"before.{anew}",
        "Pascanu, Mikolov, Bengio 2013, section 2",
        {"steps": count},
    )  # fmt: skip


def _unbroken(window: Window) -> int | None:
    """Where the losses that are none begin, if all are from there on, ten at least."""
    good = np.flatnonzero(~window.nonfinite_loss)
    start = int(good[-1]) + 1 if len(good) else 0
    return start if len(window) - start >= _FOR_GOOD else None


def _runs_away(loss: Array, end: int) -> int:
    """From where on the losses that come before `end` are far above what was usual, if they are."""
    before = loss[max(0, end - 4 * _RUN_UP) : max(0, end - _RUN_UP)]
    before = before[np.isfinite(before)]
    start = end
    while len(before) and start > end - _RUN_UP and loss[start - 1] > 10 * np.median(before) > 0:
        start -= 1
    return start


def nonfinite_gradient(window: Window) -> Sign | None:
    """Gradients had NaN or inf within the last 200 steps, though the loss was finite."""
    recent = window.last(_RECENT)
    where = recent.nonfinite & ~recent.nonfinite_loss
    count = int(where.sum())
    if not count or _are_of_weights(recent, where):
        return None
    applied = int((where & ~recent.skipped).sum())
    return Sign(
        "nonfinite_gradient", "critical" if applied or count > 1 else "warning", float(count),
        recent.span(where),
        f"{count} of the last {len(recent)} steps had NaN or inf in a gradient; "
        + (f"{applied} of them were applied" if applied else "they were left out"),
        "The events say where it entered. At a parameter: look at that layer's backward pass (sqrt, "
        "norm and division at 0, log of 0) and at autocast ranges. In all of them: at the batch, the "
        "forward pass and the loss.",
        "PyTorch, Autograd mechanics; design of on_nonfinite",
        {"steps": count, "applied": applied},
    )  # fmt: skip


def nonfinite_weights(window: Window) -> Sign | None:
    """The weights were NaN or inf before an update, and no gradient has been finite since."""
    bad = window.bad_weights
    if bad is None:
        return None
    since = window.step >= bad.step
    if not since.any() or window.finite[since].any():
        return None
    before = window.step == bad.step - 1
    if (window.nonfinite & ~window.skipped)[before].any():
        why = "The step before, whose gradient had NaN or inf, was applied: see its event. "
    elif window.finite[before].any():
        why = (
            "The gradient of the step before was finite, so neither the forward pass nor the data made "
            "them so: look at what the optimizer divides by (an eps of 0, a second moment of 0), at its "
            "learning rate, and at what the loop writes to the weights after step(). "
        )
    else:
        why = "Look at where the weights come from: an initialisation, or a checkpoint. "
    return Sign(
        "nonfinite_weights", "critical", float(bad.parameters), window.span(since),
        f"the weights of {bad.parameters} of {bad.tensors} parameters, the first {bad.first}, are NaN or inf "
        f"since before step {bad.step:,}",
        f"{why}Go on from a checkpoint from before step {bad.step:,}: no step mends them.",
        "IEEE 754: 0/0 and what is computed from NaN are NaN",
        {"parameter": bad.first, "step": bad.step, "parameters": bad.parameters},
    )  # fmt: skip


def _are_of_weights(window: Window, where: Flags) -> bool:
    """Whether weights that were NaN or inf already made all of these steps so."""
    bad = window.bad_weights
    return bad is not None and bool((window.step[where] >= bad.step).all())


def dead_gradient(window: Window) -> Sign | None:
    """The whole gradient was exactly 0."""
    recent = window.last(_RECENT)
    where = recent.pre_norm == 0.0
    count = int(where.sum())
    if not count:
        return None
    return Sign(
        "dead_gradient", "warning", float(count), recent.span(where),
        f"the gradient was exactly 0 in {count} of the last {len(recent)} steps",
        "Nothing was learnt there: a batch whose loss is masked out, a graph cut by detach() or "
        "no_grad(), activations that are all saturated; or a loss of 0, such as a hinge that is satisfied, "
        "which leaves nothing to learn.",
        "bugs of gradient clipping: the dead batch",
        {"steps": count},
    )  # fmt: skip


def no_gradient(window: Window) -> Sign | None:
    """The greater part of the steps, or each of the last, had no gradient at all."""
    absent = window.absent
    count, steps = int(absent.sum()), len(window)
    there = np.flatnonzero(~absent)
    row = steps - (int(there[-1]) + 1 if len(there) else 0)  # so many at the end
    strength = row / (_IN_A_ROW if len(there) else _FROM_THE_START)
    if steps >= _OF_STEPS:
        strength = max(strength, count / steps / _GREATER_PART)
    if not strength:
        return None
    last = f", the last {row:,} among them," if len(there) and row >= _FROM_THE_START else ""
    return Sign(
        "no_gradient", "warning", strength, window.span(absent),
        f"in {count:,} of the last {steps:,} steps{last} no parameter had a gradient, so that the "
        "optimizer changed no parameter",
        "Check that backward() is called before each step(), that the optimizer holds the parameters "
        "of the model that is trained (not those of a copy), that they require gradients "
        "(requires_grad), that no zero_grad() comes between backward() and step(), and that neither "
        "detach() nor no_grad() cuts the graph between them and the loss.",
        "PyTorch, Autograd mechanics: setting requires_grad; torch.optim.Optimizer.step leaves out "
        "parameters whose grad is None",
        {"steps": count, "share": count / steps, "in_a_row": row},
    )  # fmt: skip


def loss_scale_trouble(window: Window) -> Sign | None:
    """The loss scaler suppresses many steps, or has fallen to where it scales no longer."""
    scaled = np.isfinite(window.loss_scale)
    if scaled.sum() < 50:
        return None
    recent = window.last(_RECENT)
    suppressed = recent.skipped & ~recent.nonfinite & np.isnan(recent.pre_norm)
    share = float(suppressed.mean())
    scale = float(window.loss_scale[scaled][-1])
    strength = max(share / _OVERFLOWS, 1.0 if scale < 1.0 else 0.0)
    if not strength:
        return None
    where = suppressed if suppressed.any() else None
    return Sign(
        "loss_scale_trouble", "warning", strength, recent.span(where),
        f"the loss scaler suppressed {100 * share:.0f} % of the last {len(recent)} steps; its "
        f"scale is {scale:g}",
        "Gradients overflow float16 at any scale: lower the learning rate, use bfloat16, or look "
        "for a layer whose activations explode. A scale under 1 makes small gradients vanish.",
        "Micikevicius et al. 2018, Mixed precision training, section 3.2",
        {"share": share, "loss_scale": scale},
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    nonfinite_weights,
    nonfinite_loss,
    nonfinite_gradient,
    no_gradient,
    dead_gradient,
    loss_scale_trouble,
)
