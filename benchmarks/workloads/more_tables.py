"""Tables and series of the second set: doctors' visits, a survey, the economy, sunspots."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from statsmodels.datasets import fair, macrodata, randhie
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from workloads.images import _batches
from workloads.sequences import series
from workloads.workload import Workload, seeded


def _standardised(values):
    x = torch.tensor(np.asarray(values), dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0)


@functools.cache
def visits():
    """20,190 years of insured persons: standardised columns, and the visits to a doctor in each."""
    data = randhie.load_pandas().data
    counts = torch.tensor(data.pop("mdvis").to_numpy(), dtype=torch.float32)
    return _standardised(data), counts


def poisson(seed, steps=1000, batch=128):
    """Doctors' visits counted by a perceptron with batch norm and dropout, in one cycle."""
    generator = seeded(seed)
    x, counts = visits()
    model = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Dropout(0.1),
        nn.Linear(64, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.Linear(32, 1),
    )  # fmt: skip

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.poisson_nll_loss(model(x[rows])[:, 0], counts[rows])

    def share(step, rise=0.25, start=1 / 25, end=1e-5):
        """One cycle (Smith 2018), with cosines."""
        if step < rise * steps:
            low, done = start, step / (rise * steps)
        else:
            low, done = end, 1 - (step - rise * steps) / ((1 - rise) * steps)
        return low + (1 - low) * (0.5 - 0.5 * math.cos(math.pi * done))

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return Workload(model, optimizer, loss, steps, schedule=share)


@functools.cache
def crossed():
    """A survey of 6,366 wives: the answers and pairs each gave, of how many, and who had an affair."""
    data = fair.load_pandas().data
    had = torch.tensor(data.pop("affairs").to_numpy() > 0, dtype=torch.float32)
    answers = data.astype(str)
    pairs = [answers[a] + " " + answers[b] for a, b in itertools.combinations(answers, 2)]
    columns, known = [*(answers[name] for name in answers), *pairs], 0
    places = []
    for column in columns:
        codes, kinds = column.factorize(sort=True)
        places.append(codes + known)
        known += len(kinds)
    return torch.tensor(np.stack(places, 1)), known, had


def wide(seed, steps=1000, batch=128):
    """A wide logistic regression by Adagrad (Cheng et al. 2016): nothing to clip."""
    generator = seeded(seed)
    places, known, had = crossed()
    model = nn.EmbeddingBag(known, 1, mode="sum")
    nn.init.zeros_(model.weight)

    def loss():
        rows = _batches(len(had), batch, generator)
        scores = model(places[rows])[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(scores, had[rows])

    return Workload(model, torch.optim.Adagrad(model.parameters(), lr=0.05), loss, steps)


@functools.cache
def quarters():
    """How nine measures of the American economy changed, quarter by quarter since 1959."""
    data = macrodata.load_pandas().data
    grown = ["realgdp", "realcons", "realinv", "realgovt", "realdpi", "cpi", "m1"]
    data[grown] = np.log(data[grown])
    return _standardised(data[[*grown, "tbilrate", "unemp"]].diff().iloc[1:])


class Causal(nn.Module):
    """Two dilated convolutions that see only what came before, beside a shortcut."""

    def __init__(self, inputs, outputs, dilation):
        super().__init__()
        self.reach, self.drop = 2 * dilation, nn.Dropout(0.2)
        self.first = weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.shortcut = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x):
        seen = x
        for layer in (self.first, self.second):
            seen = self.drop(torch.relu(layer(nn.functional.pad(seen, (self.reach, 0)))))
        return torch.relu(seen + self.shortcut(x))


def temporal_convolutions(seed, steps=600, batch=32, length=32):
    """The economy's next quarter, by a temporal convolutional network (Bai et al. 2018)."""
    generator = seeded(seed)
    values = quarters()
    model = nn.Sequential(
        *(Causal(inputs, 24, dilation) for inputs, dilation in ((9, 1), (24, 2), (24, 4))),
        nn.Conv1d(24, 9, 1),
    )

    def loss():
        starts = _batches(len(values) - length, batch, generator).tolist()
        rows = torch.stack([values[s : s + length + 1].T for s in starts])
        return nn.functional.huber_loss(model(rows[..., :-1]), rows[..., 1:])

    return Workload(model, torch.optim.NAdam(model.parameters(), lr=2e-3), loss, steps)


def mixture(seed, steps=1500, batch=64, lags=12, parts=3):
    """How likely the next sunspot number is: a mixture density network (Bishop 1994)."""
    generator = seeded(seed)
    values = series("sunspots")
    model = nn.Sequential(
        nn.Linear(lags, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3 * parts)
    )
    windows = values.unfold(0, lags + 1, 1)

    def loss():
        rows = windows[_batches(len(windows), batch, generator)]
        shares, means, log_deviations = model(rows[:, :-1]).chunk(3, -1)
        normal = torch.distributions.Normal(means, log_deviations.exp())
        likely = shares.log_softmax(-1) + normal.log_prob(rows[:, -1:])
        return -likely.logsumexp(-1).mean()

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps)
