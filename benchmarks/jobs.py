"""Does `TargetRatio` hold its band? Small real jobs, each under a policy, counted over windows.

For each job: the share of all 200-step windows after 100 steps of warm-up in which 10–30 % of the
steps were clipped; and on a recurrent network that explodes, how many seeds solve their task.

    .venv/bin/python benchmarks/jobs.py
    .venv/bin/python benchmarks/jobs.py --only rnn --seeds 1
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import gradwatch
from gradwatch.testing import MemorySink

WINDOW, WARMUP = 200, 100


class Watched:
    """An optimizer under a policy, and what came of its steps."""

    def __init__(self, optimizer, policy):
        self.optimizer, self.sink = optimizer, MemorySink()
        self.agent = gradwatch.Agent(optimizer, clip=policy, store=self.sink, metrics_port=None)

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.agent.log(loss=loss)
        self.optimizer.step()

    def clipped(self):
        self.agent.close()
        return np.array([record.clipped for record in self.sink.steps])


# -- the jobs: each takes a policy and a seed, and returns clip flags and how it ended ------------


class Recurrent(nn.Module):
    """A plain tanh network whose recurrent weights begin above 1: its gradients explode."""

    def __init__(self, hidden=50, gain=1.2):
        super().__init__()
        self.rnn = nn.RNN(6, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 4)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)

    def forward(self, x):
        states, _ = self.rnn(x)
        return self.head(states[:, -1])


def temporal_order(generator, batch=32, length=30):
    """In which order did two symbols come, far apart in noise? (Hochreiter, Schmidhuber 1997)."""
    symbols = torch.randint(0, 4, (batch, length), generator=generator)
    first = torch.randint(length // 10, length // 5, (batch,), generator=generator)
    second = torch.randint(4 * length // 10, length // 2, (batch,), generator=generator)
    marks = torch.randint(0, 2, (batch, 2), generator=generator)
    rows = torch.arange(batch)
    symbols[rows, first], symbols[rows, second] = 4 + marks[:, 0], 4 + marks[:, 1]
    return nn.functional.one_hot(symbols, 6).float(), 2 * marks[:, 0] + marks[:, 1]


def rnn(policy, seed, steps=3000):
    """Solved: all of 1,000 fresh sequences but at most 1 % told right."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Recurrent()
    job = Watched(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), policy)
    for _ in range(steps):
        x, order = temporal_order(generator)
        job.step(nn.functional.cross_entropy(model(x), order))
    with torch.no_grad():
        x, order = temporal_order(generator, batch=1000)
        accuracy = (model(x).argmax(1) == order).float().mean().item()
    return job.clipped(), accuracy >= 0.99, f"{accuracy:.1%} right"


def characters():
    """Real text that every Python has: the source of a few of its modules."""
    names = ("argparse", "ast", "inspect", "statistics", "textwrap", "typing")
    text = "".join(Path(importlib.util.find_spec(name).origin).read_text() for name in names)
    alphabet = sorted(set(text))
    return torch.tensor([alphabet.index(c) for c in text]), len(alphabet)


def char_lstm(policy, seed, steps=1500, length=64, batch=16):
    """The next character of Python source; ended at this cross-entropy."""
    torch.manual_seed(seed)
    text, size = characters()
    embed, lstm, head = (
        nn.Embedding(size, 48),
        nn.LSTM(48, 96, batch_first=True),
        nn.Linear(96, size),
    )
    model = nn.ModuleList([embed, lstm, head])
    job = Watched(torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True), policy)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length - 1, (batch,))
        rows = torch.stack([text[s : s + length + 1] for s in starts])
        scores = head(lstm(embed(rows[:, :-1]))[0])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        job.step(loss)
        losses.append(loss.item())
    return job.clipped(), None, f"loss {np.mean(losses[-100:]):.3f}"


def cnn(policy, seed, steps=1500, batch=32):
    """Handwritten digits (Alpaydin, Kaynak 1998); ended at this share of held-out images."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(288, 10),
    )  # fmt: skip
    job = Watched(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), policy)
    for _ in range(steps):
        rows = torch.randint(0, 1400, (batch,))
        job.step(nn.functional.cross_entropy(model(images[rows]), labels[rows]))
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    return job.clipped(), None, f"{accuracy:.1%} right"


def policy_gradient(policy, seed, steps=1200, poles=16, horizon=100):
    """REINFORCE on a cart with a pole (Barto, Sutton, Anderson 1983); ended at this many upright."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    job = Watched(torch.optim.Adam(model.parameters(), lr=3e-3), policy)
    kept = []
    for _ in range(steps):
        state = torch.rand(poles, 4) * 0.1 - 0.05
        alive, scores, lives = torch.ones(poles), [], []
        for _ in range(horizon):
            choice = torch.distributions.Categorical(logits=model(state))
            push = choice.sample()
            scores.append(choice.log_prob(push) * alive)
            state = _cart(state, 20.0 * push - 10.0)
            alive = alive * ((state[:, 0].abs() < 2.4) & (state[:, 2].abs() < 0.21))
            lives.append(alive)
            if not alive.any():
                break
        lives = torch.stack(lives)
        returns = lives.flip(0).cumsum(0).flip(0)
        advantage = (returns - returns.mean(1, keepdim=True)) / (returns.std() + 1e-6)
        job.step(-(torch.stack(scores) * advantage).sum(0).mean())
        kept.append(lives.sum(0).mean().item())
    return job.clipped(), None, f"{np.mean(kept[-100:]):.0f} of {horizon} steps upright"


def _cart(state, force):
    _, speed, angle, turning = state.unbind(1)
    sin, cos = angle.sin(), angle.cos()
    push = (force + 0.05 * turning**2 * sin) / 1.1
    bend = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    pull = push - 0.05 * bend * cos / 1.1
    return state + 0.02 * torch.stack([speed, pull, turning, bend], 1)


JOBS = {
    "tanh RNN, temporal order": (rnn, 3.0),
    "char-LSTM, Python source": (char_lstm, None),
    "CNN, digits": (cnn, None),
    "policy gradient, cart and pole": (policy_gradient, None),
}


def in_band(clipped, low=0.10, high=0.30):
    """The share of windows whose clip ratio lies in the band."""
    ratios = np.convolve(clipped[WARMUP:], np.ones(WINDOW) / WINDOW, mode="valid")
    return float(np.mean((ratios >= low - 1e-9) & (ratios <= high + 1e-9)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=[job.__name__ for job, _ in JOBS.values()])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140, highlight=False)
    table = Table(title="share of 200-step windows in the band of 10–30 %", box=box.MARKDOWN)
    for heading in ("job", "policy", "seeds", "windows in the band", "solved", "ended at", "s"):
        table.add_column(heading)
    for name, (job, cap) in JOBS.items():
        if arguments.only not in {None, job.__name__}:
            continue
        policies = [gradwatch.TargetRatio(), gradwatch.ClipNorm(1.0)]
        if cap is not None:
            policies.insert(1, gradwatch.TargetRatio(cap=cap))
            policies += [gradwatch.ClipNorm(cap), gradwatch.ObserveOnly()]
        for policy in policies:
            began = time.perf_counter()
            seeds = range(arguments.seeds if cap is not None else min(2, arguments.seeds))
            results = [job(policy, seed) for seed in seeds]
            shares = [in_band(clipped) for clipped, _, _ in results]
            solved = [bool(s) for _, s, _ in results if s is not None]
            table.add_row(
                name,
                str(policy),
                str(len(results)),
                f"{np.mean(shares):.0%}",
                f"{sum(solved)} of {len(solved)}" if solved else "",
                "; ".join(ended for _, _, ended in results[:5]),
                f"{time.perf_counter() - began:.0f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
