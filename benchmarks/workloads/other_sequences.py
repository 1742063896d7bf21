"""Sequences of a further set: words, letters, brackets, four series, mazes and a chaotic signal."""

from __future__ import annotations

import collections
import functools
import importlib.util
import random
import re
from pathlib import Path

import torch
from statsmodels.datasets import co2, elec_equip, elnino, nile
from torch import nn

from workloads.images import _batches
from workloads.text import Recurrent, _language, _rows
from workloads.workload import Workload, seeded

MODULES = ("doctest", "optparse", "_pydecimal")


@functools.cache
def words(least=5):
    """The words and signs of some modules as numbers, 0 for what is rare, and how many there are."""
    text = "".join(Path(importlib.util.find_spec(name).origin).read_text() for name in MODULES)
    found = re.findall(r"\w+|[^\w\s]", text)
    known = [word for word, count in collections.Counter(found).items() if count >= least]
    places = {word: place for place, word in enumerate(known, 1)}
    return torch.tensor([places.get(word, 0) for word in found]), len(places) + 1


def elman(seed, steps=600, length=16, batch=8):
    """The next word by Elman's network (Mikolov et al. 2010): SGD on a row's sum."""
    seeded(seed)
    text, size = words()
    model = Recurrent(size, nn.RNN, 48, 48)

    def loss():
        rows = _rows(text, length, batch)
        said = model(rows[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(said, rows[:, 1:].flatten(), reduction="sum") / batch

    return Workload(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), loss, steps)


class Gated(nn.Module):
    """Causal convolutions, each with a gate, beside shortcuts (Dauphin et al. 2017)."""

    def __init__(self, size, width=40, depth=4, reach=4):
        super().__init__()
        self.embed, self.reach = nn.Embedding(size, width), reach
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(width, 2 * width, reach))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, size)

    def forward(self, x):
        x = self.embed(x).transpose(1, 2)
        for layer in self.layers:
            x = x + nn.functional.glu(layer(nn.functional.pad(x, (self.reach - 1, 0))), 1)
        return self.head(x.transpose(1, 2))


def gated(seed):
    """The next character by gated convolutions with weight norm, by Nesterov."""

    def nesterov(parameters):
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, nesterov=True)

    return _language(MODULES, Gated, nesterov, seed, 500, length=32)


class Pointer(nn.Module):
    """A recurrent encoder, and a decoder that points at what was read (Vinyals et al. 2015)."""

    def __init__(self, hidden=48):
        super().__init__()
        self.encode = nn.LSTM(1, hidden, batch_first=True)
        self.decode = nn.LSTM(1, hidden, batch_first=True)
        self.key, self.query = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 1, bias=False)

    def forward(self, read, said):
        seen, state = self.encode(read)
        asked = self.query(self.decode(said, state)[0])[:, :, None]
        return self.head(torch.tanh(self.key(seen)[:, None] + asked))[..., 0]


def pointer(seed, steps=700, batch=32, count=7):
    """Seven numbers pointed at from the least to the greatest; a batch's sum, by Adam."""
    generator, model = seeded(seed), Pointer()

    def loss():
        numbers = torch.rand(batch, count, generator=generator)
        ordered, places = numbers.sort(1)
        before = nn.functional.pad(ordered[:, :-1], (1, 0), value=-1.0)
        scores = model(numbers[..., None], before[..., None])
        return nn.functional.cross_entropy(scores.flatten(0, 1), places.flatten(), reduction="sum")

    return Workload(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss, steps)


@functools.cache
def windows(length):
    """All windows of four series as they are: carbon dioxide, sales, the sea's warmth, the Nile."""
    columns = (
        co2.load_pandas().data["co2"].resample("MS").mean().interpolate(),
        elec_equip.load_pandas().data.iloc[:, 0],
        elnino.load_pandas().data.iloc[:, 1:].stack(),
        nile.load_pandas().data["volume"],
    )
    rows = [torch.tensor(x.to_numpy(), dtype=torch.float32).unfold(0, length, 1) for x in columns]
    return torch.cat(rows)


class Blocks(nn.Module):
    """Each block forecasts, and takes from the past what it explains (Oreshkin et al. 2020)."""

    def __init__(self, length, ahead, width=96, depth=4):
        super().__init__()
        self.parts = [length, ahead]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(length, width), nn.ReLU(), nn.Linear(width, length + ahead))
            for _ in range(depth)
        )

    def forward(self, x):
        said = 0
        for block in self.blocks:
            past, after = block(x).split(self.parts, 1)
            x, said = x - past, said + after
        return said


def nbeats(seed, steps=1000, batch=64, length=24, ahead=8):
    """Four series ahead by N-BEATS, by Adam; the errors in per cent of what came."""
    generator = seeded(seed)
    rows, model = windows(length + ahead), Blocks(length, ahead)

    def loss():
        seen, after = rows[_batches(len(rows), batch, generator)].split([length, ahead], 1)
        scale = seen.amax(1, keepdim=True)
        return 100 * (model(seen / scale) * scale / after - 1).abs().mean()

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps)


@functools.cache
def brackets(count=4000, length=16):
    """Brackets of three kinds as they open and close, and which would close there, 0 for none."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        row, stack = [], []
        for left in range(length, 0, -1):
            if not stack or (len(stack) < left and draw.random() < 0.5):
                stack.append(draw.randint(1, 3))
                row.append((stack[-1], stack[-1]))
            else:
                row.append((stack.pop() + 3, stack[-1] if stack else 0))
        rows.append(row)
    return torch.tensor(rows).unbind(-1)


def matching(seed, steps=600, batch=16):
    """Which bracket is to close next, all along, by a GRU (Suzgun et al. 2019), by NAdam."""
    generator = seeded(seed)
    (x, y), model = brackets(), Recurrent(7, nn.GRU, 16, 40)
    model.head = nn.Linear(40, 4)

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.cross_entropy(model(x[rows]).transpose(1, 2), y[rows])

    return Workload(model, torch.optim.NAdam(model.parameters(), lr=3e-3), loss, steps)


@functools.cache
def mazes(count=2000, size=8):
    """Walls and goal of each maze; which of four moves are on a shortest way, none if there is none."""
    generator = torch.Generator().manual_seed(0)
    wall = torch.rand(count, size, size, generator=generator) < 0.3
    goal = torch.rand(count, size * size, generator=generator).argmax(1)
    goal = nn.functional.one_hot(goal, size * size).view_as(wall).bool()
    wall, away = wall & ~goal, torch.full(wall.shape, torch.inf).masked_fill(goal, 0)
    for _ in range(size * size):
        edged = nn.functional.pad(away, (1, 1, 1, 1), value=torch.inf)
        up, left = edged[:, :, 1:-1], edged[:, 1:-1]
        near = torch.stack([up[:, :-2], up[:, 2:], left[..., :-2], left[..., 2:]], 1)
        away = torch.minimum(away, near.amin(1) + 1).masked_fill(wall, torch.inf)
    best = (near + 1 == away[:, None]) & away.isfinite()[:, None]
    return torch.stack([wall, goal], 1).float(), best


class Planner(nn.Module):
    """Value iteration by convolutions that are learnt (Tamar et al. 2016)."""

    def __init__(self, width=16, moves=8, times=10):
        super().__init__()
        self.times = times
        self.reward = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1)
        )
        self.look = nn.Conv2d(2, moves, 3, padding=1, bias=False)
        self.head = nn.Conv2d(moves, 4, 1)

    def forward(self, x):
        value = reward = self.reward(x)
        for _ in range(self.times):
            worth = self.look(torch.cat([reward, value], 1))
            value = worth.amax(1, keepdim=True)
        return self.head(worth)


def planner(seed, steps=500, batch=12):
    """Shortest ways out of every place of a maze, cloned by a value iteration network, by RMSprop."""
    generator = seeded(seed)
    (x, best), model = mazes(), Planner()

    def loss():
        rows = _batches(len(x), batch, generator)
        right, said = best[rows].movedim(1, -1), model(x[rows]).log_softmax(1).movedim(1, -1)
        at = right.any(-1)
        return -said[at].masked_fill(~right[at], -torch.inf).logsumexp(-1).mean()

    return Workload(model, torch.optim.RMSprop(model.parameters(), lr=3e-3), loss, steps)


@functools.cache
def chaos(count=2500, delay=17):
    """Mackey and Glass's equation (1977) from 1.2 on, standardised."""
    x = [1.2] * (delay + 1)
    while len(x) < count:
        x.append(0.9 * x[-1] + 0.2 * x[-1 - delay] / (1 + x[-1 - delay] ** 10))
    x = torch.tensor(x)
    return (x - x.mean()) / x.std()


def echo(seed, steps=1500, batch=128, units=100, ahead=10, skip=100):
    """A chaotic signal read from an echo state network (Jaeger 2001), by AdamW: nothing to clip."""
    generator = seeded(seed)
    values, model = chaos(), nn.Linear(units, 1)
    inner, outer = torch.randn(units, units), 0.4 * torch.rand(units) - 0.2
    inner *= 0.9 / torch.linalg.eigvals(inner).abs().max()
    states = [torch.zeros(units)]
    for value in values[:-ahead]:
        states.append(torch.tanh(inner @ states[-1] + outer * value))
    x, y = torch.stack(states[1:])[skip:], values[ahead:, None][skip:]

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.mse_loss(model(x[rows]), y[rows])

    return Workload(model, torch.optim.AdamW(model.parameters(), lr=5e-3), loss, steps)
