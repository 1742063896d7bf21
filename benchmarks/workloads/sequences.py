"""Recurrent networks: the temporal order and adding tasks, and real time series."""

from __future__ import annotations

import functools

import torch
from statsmodels.datasets import co2, elnino, sunspots
from torch import nn

from workloads.workload import Workload, seeded


class Last(nn.Module):
    """A recurrent network read out at its last state."""

    def __init__(self, body, outputs):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.hidden_size, outputs)

    def forward(self, x):
        states, _ = self.body(x)
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


def adding(generator, batch=32, length=30):
    """The sum of the two numbers that are marked (Hochreiter, Schmidhuber 1997)."""
    values = torch.rand(batch, length, generator=generator)
    marks = torch.zeros(batch, length)
    rows = torch.arange(batch)
    marks[rows, torch.randint(0, length // 2, (batch,), generator=generator)] = 1
    marks[rows, torch.randint(length // 2, length, (batch,), generator=generator)] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(1, keepdim=True)


@functools.cache
def series(name):
    """A real series, without its mean, in units of its standard deviation."""
    column = {
        "sunspots": lambda: sunspots.load_pandas().data["SUNACTIVITY"],
        "co2": lambda: co2.load_pandas().data["co2"].interpolate().diff(),
        "elnino": elnino.load_pandas().data.iloc[:, 1:].stack,
    }[name]().dropna()
    values = torch.tensor(column.to_numpy(), dtype=torch.float32)
    return (values - values.mean()) / values.std()


def _order(body, optimizer, seed, steps):
    """Solved: all of 1,000 fresh sequences but at most 1 % told right; the score is the errors."""
    generator = seeded(seed)
    model = Last(body(), 4)

    def loss():
        x, order = temporal_order(generator)
        return nn.functional.cross_entropy(model(x), order)

    def errors():
        x, order = temporal_order(generator, batch=1000)
        return (model(x).argmax(1) != order).float().mean().item()

    return Workload(model, optimizer(model.parameters()), loss, steps, errors)


def _adding(body, optimizer, seed, steps):
    generator = seeded(seed)
    model = Last(body(), 1)

    def loss():
        x, total = adding(generator)
        return nn.functional.mse_loss(model(x), total)

    return Workload(model, optimizer(model.parameters()), loss, steps)


def _series(name, body, optimizer, seed, steps, length=24, batch=32):
    """The next value of a real series from those before it."""
    seeded(seed)
    values, model = series(name), Last(body(), 1)

    def loss():
        starts = torch.randint(0, len(values) - length - 1, (batch,)).tolist()
        rows = torch.stack([values[s : s + length + 1] for s in starts])
        return nn.functional.mse_loss(model(rows[:, :-1, None]), rows[:, -1:])

    return Workload(model, optimizer(model.parameters()), loss, steps)


def _exploding(hidden, gain, inputs):
    """A plain tanh network whose recurrent weights begin above 1: its gradients explode."""
    body = nn.RNN(inputs, hidden, batch_first=True)
    nn.init.orthogonal_(body.weight_hh_l0, gain)
    return body


def _sgd(lr, momentum=0.9):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def _adam(lr):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def rnn_order(seed):
    """A plain tanh RNN on the temporal-order task: it explodes (Pascanu et al. 2013)."""
    return _order(lambda: _exploding(50, 1.2, 6), _sgd(0.01), seed, 2000)


def lstm_adding(seed):
    """An LSTM on the adding task."""
    return _adding(lambda: nn.LSTM(2, 48, batch_first=True), _adam(3e-3), seed, 1200)


def gru_sunspots(seed):
    """A GRU on the yearly sunspot numbers since 1700."""
    return _series("sunspots", lambda: nn.GRU(1, 32, batch_first=True), _sgd(0.05), seed, 800)


class Months(nn.Module):
    """A transformer's encoder over the months before."""

    def __init__(self, length=24, width=32):
        super().__init__()
        self.embed, self.place = nn.Linear(1, width), nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.body(self.embed(x) + self.place)[:, -1])


def transformer_elnino(seed, steps=800, length=24, batch=32):
    """A small transformer on the sea's monthly temperature off Peru since 1950."""
    seeded(seed)
    values, model = series("elnino"), Months(length)

    def loss():
        starts = torch.randint(0, len(values) - length - 1, (batch,)).tolist()
        rows = torch.stack([values[s : s + length + 1] for s in starts])
        return nn.functional.mse_loss(model(rows[:, :-1, None]), rows[:, -1:])

    return Workload(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, steps)


# -- to tune on ----------------------------------------------------------------------------------


def gru_order(seed):
    """A GRU on the temporal-order task."""
    return _order(lambda: nn.GRU(6, 40, batch_first=True), _adam(2e-3), seed, 800)


def rnn_adding(seed):
    """A plain tanh RNN on the adding task, with weights that explode."""
    return _adding(lambda: _exploding(40, 1.3, 2), _sgd(0.01), seed, 1500)


def lstm_co2(seed):
    """An LSTM on the weekly changes of carbon dioxide over Mauna Loa."""
    return _series("co2", lambda: nn.LSTM(1, 32, batch_first=True), _adam(2e-3), seed, 800)


def rnn_sunspots(seed):
    """A tanh RNN on the sunspot numbers, by plain SGD."""
    return _series("sunspots", lambda: nn.RNN(1, 24, batch_first=True), _sgd(0.02, 0), seed, 1000)
