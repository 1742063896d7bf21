"""What `closed_loop.py` prints: a row a job, a row a method, and what is to be reached."""

from __future__ import annotations

import math

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_ind

CONSTANT = {"keep", "change"}
WORSE = 0.05  # a one-sided p below which a difference is more than the seeds' noise


def show(chains, others, jobs):
    """Print the three tables.

    Args:
        chains: a `Chain` a job and seed.
        others: (job, method, Outcome) of the simple methods.
        jobs: name → job, with its expected verdict.
    """
    console = Console(width=200, highlight=False)
    names = list(dict.fromkeys(chain.job for chain in chains))
    of = {name: [chain for chain in chains if chain.job == name] for name in names}
    console.print(_per_job(of, others, jobs))
    console.print(_per_method(of, others))
    console.print(_reached(of, others, jobs))


def _per_job(of, others, jobs):
    table = _table(
        "job", "label", "verdicts", "constant", "clipped at 1.0, %", "as recommended", "by the constant",
        "second round", "its interval", "ended at 1.0", "as recommended", "p worse", "unclipped",
    )  # fmt: skip
    for name, chains in of.items():
        bare = [o.ended for job, method, o in others if (job, method) == (name, "no clipping")]
        table.add_row(
            name,
            jobs[name].expected,
            _counted([c.verdict for c in chains]),
            _range([c.threshold for c in chains], "{:.3g}"),
            _range([100 * c.first.clip_ratio for c in chains], "{:.0f}"),
            _range([100 * c.recommended.clip_ratio for c in chains], "{:.0f}"),
            _range([100 * c.constant.clip_ratio for c in chains], "{:.0f}"),
            _range([100 * c.second.clip_ratio for c in chains if c.second], "{:.0f}"),
            f"{100 * np.median([c.interval[0] for c in chains]):.0f}–"
            f"{100 * np.median([c.interval[1] for c in chains]):.0f}",
            _ended(c.first.ended for c in chains),
            _ended(c.recommended.ended for c in chains),
            f"{worse(chains):.2f}",
            _ended(bare),
        )
    return table


def _per_method(of, others):
    table = _table("method", "runs in the band", "200-step windows in the band", "diverged")
    rows = {
        "recommended": [c.recommended for chains in of.values() for c in chains],
        "its constant": [c.constant for chains in of.values() for c in chains],
    }
    for _, method, outcome in others:
        rows.setdefault(method, []).append(outcome)
    for method, outcomes in rows.items():
        table.add_row(
            method,
            _share([o.in_band for o in outcomes]),
            f"{np.mean([o.windows for o in outcomes]):.1%}",
            f"{sum(o.diverged for o in outcomes)} of {len(outcomes)}",
        )
    return table


def _reached(of, others, jobs):
    every = [chain for chains in of.values() for chain in chains]
    fit = [c for c in every if c.verdict not in {"fix_training", "not_needed", "not_enough_data"}]
    constants = [c for c in fit if c.verdict in CONSTANT]
    second = [c for c in constants if c.second_verdict in CONSTANT]
    told = [c for c in every if c.verdict != "fix_training"]
    moves = [abs(math.log(c.moved)) for c in second]
    within = [c.interval[0] <= c.constant.clip_ratio <= c.interval[1] for c in told]
    widths = [100 * (c.interval[1] - c.interval[0]) for c in told]
    harmed = [name for name, chains in of.items() if worse(chains) < WORSE]
    better = [n for n, chains in of.items() if _better(chains)]
    bare = {}
    for job, method, outcome in others:
        if method == "no clipping":
            bare.setdefault(job, []).append(outcome.diverged)
    saved = [
        (n, sum(not c.recommended.diverged for c in of[n])) for n in of if any(bare.get(n, []))
    ]
    again = [not c.second.diverged for c in every if c.verdict == "fix_training" and c.second]
    windows = [o.windows for _, method, o in others if method == "TargetRatio"]
    labelled = {name: chains for name, chains in of.items() if jobs[name].expected}
    right = [n for n, chains in labelled.items() if all(_as_labelled(c, jobs) for c in chains)]
    table = _table("measure", "to reach", "reached")
    for row in (
        ("recommended, in the band", "95 %", _share([c.recommended.in_band for c in fit])),
        (
            "of these, constants, first round",
            "80 %",
            _share([c.recommended.in_band for c in constants]),
        ),
        ("the constant that is told in any case", "", _share([c.constant.in_band for c in told])),
        ("constants, second round", "90 %", _share([c.second.in_band for c in second])),
        (
            "it differs from the first by a factor of, at most",
            "",
            f"{math.exp(max(moves, default=0.0)):.2f}",
        ),
        ("80 % interval holds the ratio", "75–90 %", _share(within)),
        ("its median width", "", f"{np.median(widths):.0f} points"),
        ("TargetRatio, windows in the band", "95 %", f"{np.mean(windows):.1%}"),
        ("jobs that end worse than at 1.0, beyond noise", "0", ", ".join(harmed) or "0"),
        (
            "jobs that end better on average",
            f"{math.ceil(len(of) / 3)}",
            f"{len(better)} of {len(of)} ({'; '.join(better)})",
        ),
        ("diverge unclipped, finish as recommended", "all", _saved(saved, of)),
        ("saved by a constant; asked again, and finish under that", "all", _share(again)),
        ("verdict as labelled, all seeds", f"{len(labelled)}", f"{len(right)} of {len(labelled)}"),
        (
            "verdict as labelled, seeds",
            "",
            _share([_as_labelled(c, jobs) for chains in labelled.values() for c in chains]),
        ),
    ):
        table.add_row(*row)
    return table


def _as_labelled(chain, jobs):
    return chain.verdict == jobs[chain.job].expected


def worse(chains):
    """How likely a difference as bad as this is by the seeds alone: one-sided Welch test."""
    was = [min(c.first.ended, 1e9) for c in chains]
    now = [min(c.recommended.ended, 1e9) for c in chains]
    if sorted(was) == sorted(now) or len(was) < 2:
        return 1.0
    return float(ttest_ind(now, was, equal_var=False, alternative="greater").pvalue)


def _better(chains):
    """Where anything was changed: whether it ended better on average."""
    was, now = (np.mean([getattr(c, k).ended for c in chains]) for k in ("first", "recommended"))
    return any(c.policy not in {None, "ClipNorm(1.0)"} for c in chains) and bool(now < was)


def _table(*headings):
    table = Table(box=box.MARKDOWN)
    for heading in headings:
        table.add_column(heading)
    return table


def _share(flags):
    return f"{np.mean(flags):.0%} ({sum(flags)} of {len(flags)})" if len(flags) else "none"


def _saved(saved, of):
    return (
        "; ".join(f"{name}: {count} of {len(of[name])}" for name, count in saved) or "none diverges"
    )


def _counted(words):
    return ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))


def _range(values, pattern):
    if not values:
        return ""
    low, high = pattern.format(min(values)), pattern.format(max(values))
    return low if low == high else f"{low}–{high}"


def _ended(values):
    values = list(values)
    return (
        f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else f"{values}"
    )
