"""The demo: a real training job on real data, watched from its first step.

A two-layer bidirectional LSTM with attention reads the UCI handwritten digits (Alpaydin, Kaynak
1998; through scikit-learn) as sequences of eight rows of eight pixels. Two faults are planted, so
that there is something to see: one batch with a corrupt image, one that was scaled wrongly.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gradwatch
from gradwatch.config import redact
from gradwatch_monitor import Recommendation, Store, recommend
from gradwatch_monitor.ratio import clip_ratio

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["BiLSTMWithAttention", "Result", "run", "tell"]

BATCH = 32
NOISE = 0.3  # standard deviation of what is added to the pixels, against overfitting
SEED = 0
CORRUPT_AT = 0.45  # where in the run, as a share of its steps
MISSCALED_AT = 0.7


class BiLSTMWithAttention(nn.Module):
    """Rows (batch, 8, 8) → class scores (batch, 10), by an attention over the rows."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.attention = nn.Linear(2 * hidden, 1)
        self.head = nn.Linear(2 * hidden, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Score each class."""
        states, _ = self.lstm(rows)
        weights = self.attention(states).softmax(dim=1)
        scores: Tensor = self.head((weights * states).sum(dim=1))
        return scores


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What the demo leaves: where its records are, and what is recommended."""

    store: str
    run: str
    uid: str
    metrics_url: str | None
    accuracy: float
    recommendation: Recommendation

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "recommendation": self.recommendation.as_dict(),
        }


def run(store: str, *, epochs: int, console: Console) -> Result:
    """Train, watched; then ask for a recommendation."""
    torch.manual_seed(SEED)
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=SEED, stratify=labels
    )
    console.print(
        f"Training a bidirectional LSTM with attention on {len(train):,} handwritten digits. "
        "One corrupt and one\nmisscaled batch are planted on the way, to have something to see."
    )
    model = BiLSTMWithAttention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)

    # The one line:
    gradwatch.wrap(optimizer, model=model, clip=gradwatch.ClipNorm(1.0), run="demo", store=store)

    agent = gradwatch.Agent.of(optimizer)
    _train(model, optimizer, agent, images[train], labels[train], epochs, console)
    agent.flush()
    with torch.no_grad():
        right = model.eval()(images[test]).argmax(dim=1) == labels[test]
    metrics_url, run_id = agent.metrics_url, agent.run_id
    agent.close()
    with Store(store) as opened:
        found = opened.run(run_id)
        result = recommend(opened, found.id)
    return Result(
        redact(store), found.name, found.uid, metrics_url, right.float().mean().item(), result
    )


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    agent: gradwatch.Agent,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    console: Console,
) -> None:
    per_epoch = -(-len(labels) // BATCH)
    total = epochs * per_epoch
    corrupt, misscaled = int(CORRUPT_AT * total), int(MISSCALED_AT * total)
    clipped = finite = step = 0
    progress = Progress(
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[live]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("training", total=total, epoch=1, epochs=epochs, live="")
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(labels)).split(BATCH):  # type: ignore[no-untyped-call]
                rows = images[batch] + NOISE * torch.randn(len(batch), 8, 8)
                if step == corrupt:
                    rows[0, 0, 0] = torch.nan
                if step == misscaled:
                    rows *= 100
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(rows), labels[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                agent.log(loss=loss)
                optimizer.step()
                step += 1
                if (last := agent.last) is not None:
                    clipped += last.clipped
                    finite += math.isfinite(last.pre_norm)
                    ratio = clip_ratio(clipped, finite)
                    live = (
                        f"norm {last.pre_norm:7.3f}  clipped {'–' if ratio is None else f'{ratio:4.0%}'}  "
                        f"loss {last.loss:6.3f}"
                    )
                    progress.update(task, advance=1, epoch=epoch, live=live)


def tell(result: Result, console: Console) -> None:
    """Say where everything is, and the recommendation in a sentence."""
    recommendation = result.recommendation
    for label, value in (
        ("Accuracy", f"{100 * result.accuracy:.1f} % on digits it has not seen"),
        ("Store", result.store),
        ("Metrics", f"{result.metrics_url or 'none'} (while the job runs)"),
        ("Verdict", f"{recommendation.verdict.replace('_', ' ')}: {recommendation.sentence}"),
    ):
        console.print(f"[bold]{label:9}[/bold] {escape(value)}")
    if recommendation.policy is not None:
        console.print(
            f"[bold]{'Next run':9}[/bold] clip=gradwatch.{escape(str(recommendation.policy))}"
        )
    console.print(
        f"[bold]{'Try':9}[/bold] gradwatch show {result.run} · gradwatch recommend {result.run}"
    )
