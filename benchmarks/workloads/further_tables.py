"""Images and tables of a third set: photographs, schools, births, tumours, a household's food."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from statsmodels.datasets import engel, fertility, star98
from torch import nn

from workloads.images import _batches, digits, table
from workloads.more_tables import _standardised
from workloads.text import warmed
from workloads.workload import Workload, seeded


@functools.cache
def photograph(size=64):
    """The places of a photograph's pixels from -1 to 1, and their colours from 0 to 1."""
    flower = torch.tensor(load_sample_images().images[1], dtype=torch.float32) / 255
    small = nn.functional.adaptive_avg_pool2d(flower.permute(2, 0, 1)[:, :, 100:527], size)
    line = torch.linspace(-1, 1, size)
    return torch.cartesian_prod(line, line), small.flatten(1).T


class Sine(nn.Module):
    """A layer whose activation is a sine (Sitzmann et al. 2020)."""

    def __init__(self, inputs, outputs, frequency=30.0, *, first=False):
        super().__init__()
        self.linear, self.frequency = nn.Linear(inputs, outputs), frequency
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(self.frequency * self.linear(x))


def siren(seed, steps=1500, batch=512):
    """A photograph as a function of the place, by sines; squared errors summed over the pixels."""
    generator = seeded(seed)
    places, colours = photograph()
    model = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), Sine(64, 64), nn.Linear(64, 3))

    def loss():
        rows = _batches(len(places), batch, generator)
        return nn.functional.mse_loss(model(places[rows]), colours[rows], reduction="sum")

    return Workload(model, torch.optim.Adam(model.parameters(), lr=3e-4), loss, steps)


class Coupling(nn.Module):
    """Half of the columns scale and shift the other half."""

    def __init__(self, columns, hidden, *, odd):
        super().__init__()
        self.register_buffer("kept", (torch.arange(columns) % 2 == odd).float())
        self.net = nn.Sequential(
            nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2 * columns),
        )  # fmt: skip

    def forward(self, x):
        """What becomes of the rows, and the logarithm of how much that stretches each."""
        scale, shift = self.net(x * self.kept).chunk(2, -1)
        scale = torch.tanh(scale) * (1 - self.kept)
        return x * scale.exp() + shift * (1 - self.kept), scale.sum(-1)


def flow(seed, steps=800, batch=64, depth=6):
    """The density of tumours' thirty measures in nats, by a RealNVP (Dinh et al. 2017)."""
    generator = seeded(seed)
    x, _ = table("cancer")
    model = nn.ModuleList(Coupling(x.shape[1], 64, odd=layer % 2) for layer in range(depth))
    normal = torch.distributions.Normal(0, 1)

    def loss():
        rows, stretched = x[_batches(len(x), batch, generator)], 0
        rows = rows + 0.1 * torch.randn(rows.shape, generator=generator)
        for layer in model:
            rows, stretch = layer(rows)
            stretched = stretched + stretch
        return -(normal.log_prob(rows).sum(-1) + stretched).mean()

    return Workload(model, torch.optim.Adamax(model.parameters(), lr=1e-3), loss, steps)


@functools.cache
def schools():
    """303 districts of California: standardised columns; pupils above and below the median."""
    data = star98.load_pandas().data
    pupils = torch.tensor(data[["NABOVE", "NBELOW"]].to_numpy(), dtype=torch.float32)
    return _standardised(data.iloc[:, 2:14]), pupils


def binomial(seed, steps=1500, batch=32):
    """Pupils above the median: the binomial deviance (Gill 2000), summed over all, by Nesterov."""
    generator = seeded(seed)
    x, pupils = schools()
    model = nn.Sequential(
        nn.Linear(x.shape[1], 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 2)
    )
    attained = torch.special.xlogy(pupils, pupils / pupils.sum(1, keepdim=True))

    def loss():
        rows = _batches(len(x), batch, generator)
        return 2 * (attained[rows] - pupils[rows] * model(x[rows]).log_softmax(1)).sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True)
    return Workload(model, optimizer, loss, steps)


def additive(seed, steps=1000, batch=64, hidden=24):
    """Diabetes after a year in its own units, 25 to 346: a network a column (Agarwal et al. 2021)."""
    generator = seeded(seed)
    x, target = table("diabetes")
    columns, target = x.shape[1], target.float()
    model = nn.Sequential(
        nn.Conv1d(columns, columns * hidden, 1, groups=columns), nn.ReLU(),
        nn.Conv1d(columns * hidden, columns * hidden, 1, groups=columns), nn.ReLU(),
        nn.Conv1d(columns * hidden, columns, 1, groups=columns),
    )  # fmt: skip

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.mse_loss(model(x[rows, :, None]).sum((1, 2)), target[rows])

    return Workload(model, torch.optim.RMSprop(model.parameters(), lr=1e-3), loss, steps)


@functools.cache
def births():
    """Births per woman: which country, which year since 1960, how many."""
    values = fertility.load_pandas().data.iloc[:, 4:].to_numpy(np.float32)
    countries, years = np.nonzero(np.isfinite(values))
    return torch.tensor(countries), torch.tensor(years), torch.tensor(values[countries, years])


def factors(seed, steps=1500, batch=512, rank=6):
    """Births factorised by country and year (Koren et al. 2009), by Adagrad; squared errors summed."""
    generator = seeded(seed)
    country, year, count = births()
    sizes = int(country.max()) + 1, int(year.max()) + 1
    model = nn.ModuleList(nn.Embedding(size, rank + 1) for size in sizes)
    for part in model:
        nn.init.normal_(part.weight, std=0.1)

    def loss():
        rows = _batches(len(count), batch, generator)
        one, other = model[0](country[rows]), model[1](year[rows])
        said = (one[:, 1:] * other[:, 1:]).sum(1) + one[:, 0] + other[:, 0]
        return nn.functional.mse_loss(said, count[rows], reduction="sum")

    return Workload(model, torch.optim.Adagrad(model.parameters(), lr=0.1), loss, steps)


class Beside(nn.Sequential):
    """Layers beside a shortcut."""

    def forward(self, x):
        return x + super().forward(x)


def mixer(seed, steps=600, batch=32, width=24):
    """An MLP-Mixer (Tolstikhin et al. 2021) on blends of two digits (mixup, Zhang et al. 2018)."""
    generator = seeded(seed)
    x, labels = digits()
    hot = nn.functional.one_hot(labels, 10).float()

    def mixing():
        """Across the 16 patches, then across the channels."""
        return (
            Beside(nn.GroupNorm(1, width), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
            Beside(nn.GroupNorm(1, width), nn.Conv1d(width, 48, 1), nn.GELU(), nn.Conv1d(48, width, 1)),
        )  # fmt: skip

    model = nn.Sequential(
        nn.Conv2d(1, width, 2, 2), nn.Flatten(2), *mixing(), *mixing(), nn.GroupNorm(1, width),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip

    def loss():
        one, other = _batches(len(x), 2 * batch, generator).chunk(2)
        share = 0.5 * torch.rand(batch, generator=generator) ** 4  # of the other: mostly little
        blend = torch.lerp(x[one], x[other], share[:, None, None, None])
        said = torch.lerp(hot[one], hot[other], share[:, None])
        return nn.functional.cross_entropy(model(blend), said)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    return Workload(model, optimizer, loss, steps, schedule=warmed(60, steps))


class ArcFace(nn.Module):
    """Cosines to ten directions, the right one's angle widened by a margin (Deng et al. 2019)."""

    def __init__(self, width=16, margin=0.3, scale=16.0):
        super().__init__()
        self.margin, self.scale = margin, scale
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
            nn.Flatten(), nn.Linear(512, width),
        )  # fmt: skip
        self.directions = nn.Parameter(torch.randn(10, width))

    def forward(self, x, labels):
        cosines = nn.functional.normalize(self.body(x)) @ nn.functional.normalize(self.directions).T
        widened = (cosines.clamp(-0.999, 0.999).acos() + self.margin).cos()
        right = nn.functional.one_hot(labels, 10).bool()
        return self.scale * torch.where(right, widened, cosines)


def arcface(seed, steps=700, batch=48):
    """Digits told apart by angles, with ArcFace's margin, by NAdam."""
    generator = seeded(seed)
    x, labels = digits()
    model = ArcFace()

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.cross_entropy(model(x[rows], labels[rows]), labels[rows])

    return Workload(model, torch.optim.NAdam(model.parameters(), lr=1e-3), loss, steps)


def quantiles(seed, steps=1500, batch=64):
    """Five quantiles of what 235 households spend on food (Engel 1857): nothing to clip."""
    generator = seeded(seed)
    values = _standardised(np.log(engel.load_pandas().data))
    model, levels = nn.Linear(1, 5), torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])

    def loss():
        income, food = values[_batches(len(values), batch, generator)].chunk(2, 1)
        above = food - model(income)
        return torch.maximum(levels * above, (levels - 1) * above).mean()

    return Workload(model, torch.optim.RAdam(model.parameters(), lr=5e-3), loss, steps)


def sums_too_fast(seed, steps=1000, batch=32, images=5):
    """A deep set adds digits (Zaheer et al. 2017); made to go wrong, its rate hundreds of times too high."""
    generator = seeded(seed)
    x, labels = digits()
    each = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    whole = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    model = nn.ModuleList((each, whole))

    def loss():
        rows = _batches(len(x), batch * images, generator).view(batch, images)
        said = whole(each(x[rows].flatten(2)).sum(1))[:, 0]
        return nn.functional.mse_loss(said, labels[rows].sum(1).float())

    return Workload(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss, steps)
