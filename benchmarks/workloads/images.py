"""Handwritten digits (Alpaydin, Kaynak 1998), two tables of the same library, and a survey."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from statsmodels.datasets import anes96
from torch import nn

from workloads.workload import Workload, seeded


@functools.cache
def digits():
    """1,797 images of 8 × 8, from 0 to 1, and what they show."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@functools.cache
def table(name):
    """A table's standardised columns and its target."""
    data = {"cancer": load_breast_cancer, "diabetes": load_diabetes}[name]()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(data.target)


@functools.cache
def survey():
    """944 voters of 1996: standardised answers, and the party they are nearest to, of seven."""
    data = anes96.load_pandas().data.drop(columns=["vote"])
    parties = torch.tensor(data.pop("PID").to_numpy(), dtype=torch.int64)
    x = torch.tensor(data.to_numpy(), dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), parties


def _batches(count, batch, generator):
    return torch.randint(0, count, (batch,), generator=generator)


def _classifier(model, optimizer, seed, steps, batch=32, data=digits):
    generator = seeded(seed)
    x, labels = data()
    model = model()

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.cross_entropy(model(x[rows]), labels[rows])

    return Workload(model, optimizer(model.parameters()), loss, steps)


class Attention(nn.Module):
    """A bidirectional LSTM over an image's rows, weighted by attention."""

    def __init__(self, hidden=32):
        super().__init__()
        self.body = nn.LSTM(8, hidden, batch_first=True, bidirectional=True)
        self.weigh, self.head = nn.Linear(2 * hidden, 1), nn.Linear(2 * hidden, 10)

    def forward(self, x):
        states, _ = self.body(x[:, 0])
        weights = self.weigh(torch.tanh(states)).softmax(1)
        return self.head((weights * states).sum(1))


class VAE(nn.Module):
    """A variational autoencoder (Kingma, Welling 2014)."""

    def __init__(self, hidden=64, latent=8):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, 64))

    def forward(self, x):
        mean, log_variance = self.encode(x).chunk(2, -1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        away = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1)
        said = nn.functional.binary_cross_entropy_with_logits(
            self.decode(latent), x, reduction="none"
        )
        return (said.sum(-1) + away).mean()


def _convolutional(dropout=0.3):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(288, 10),
    )  # fmt: skip


def _perceptron(width=64):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def bilstm(seed):
    """A BiLSTM with attention over the rows of the digits."""
    return _classifier(Attention, lambda p: torch.optim.Adam(p, lr=2e-3), seed, 1000)


def cnn(seed):
    """A convolutional network, by SGD."""
    return _classifier(
        _convolutional, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), seed, 1200
    )


def vae(seed):
    """A variational autoencoder."""
    generator = seeded(seed)
    x, model = digits()[0].flatten(1), VAE()

    def loss():
        return model(x[_batches(len(x), 32, generator)])

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, 1200)


def too_fast(seed):
    """A perceptron whose learning rate is far too high."""
    return _classifier(_perceptron, lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9), seed, 1000)


def calm(seed):
    """Logistic regression on a table: nothing to clip."""
    return _classifier(
        lambda: nn.Linear(30, 2),
        lambda p: torch.optim.SGD(p, lr=0.02),
        seed,
        1000,
        batch=64,
        data=lambda: table("cancer"),
    )


def perceptron_survey(seed):
    """A perceptron on a survey, by SGD."""

    def model():
        return nn.Sequential(nn.Linear(survey()[0].shape[1], 64), nn.ReLU(), nn.Linear(64, 7))

    return _classifier(
        model, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), seed, 1000, data=survey
    )


# -- to tune on ----------------------------------------------------------------------------------


class Rows(nn.Module):
    """A transformer's encoder over an image's rows."""

    def __init__(self, width=32):
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(self.embed(x[:, 0]) + self.place).mean(1))


def perceptron(seed):
    """A perceptron, by SGD."""
    return _classifier(_perceptron, lambda p: torch.optim.SGD(p, lr=0.1), seed, 1000)


def cnn_normed(seed):
    """A convolutional network with batch norm, by Adam."""

    def model():
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(288, 10),
        )  # fmt: skip

    return _classifier(model, lambda p: torch.optim.Adam(p, lr=1e-3), seed, 800)


def encoder(seed):
    """A transformer's encoder over the rows of the digits."""
    return _classifier(Rows, lambda p: torch.optim.AdamW(p, lr=2e-3), seed, 700)


def autoencoder(seed):
    """An autoencoder, by RMSprop."""
    generator = seeded(seed)
    x = digits()[0].flatten(1)
    model = nn.Sequential(
        nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 48), nn.Tanh(),
        nn.Linear(48, 64),
    )  # fmt: skip

    def loss():
        rows = x[_batches(len(x), 32, generator)]
        return nn.functional.mse_loss(model(rows), rows, reduction="sum") / 32

    return Workload(model, torch.optim.RMSprop(model.parameters(), lr=1e-3), loss, 1000)


def contrastive(seed):
    """Two noisy views of a digit told from others (Chen et al. 2020)."""
    generator = seeded(seed)
    x = digits()[0].flatten(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))

    def loss():
        rows = x[_batches(len(x), 48, generator)]
        views = (rows + 0.2 * torch.randn(2, *rows.shape, generator=generator)).flatten(0, 1)
        out = nn.functional.normalize(model(views), dim=-1)
        alike = out @ out.T / 0.2 - 1e9 * torch.eye(96)
        return nn.functional.cross_entropy(alike, torch.arange(96).roll(48))

    return Workload(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, 1000)


def tabular(seed):
    """A perceptron on a table, by Adam."""

    def model():
        return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))

    return _classifier(
        model, lambda p: torch.optim.Adam(p, lr=1e-3), seed, 1000, data=lambda: table("cancer")
    )


def calm_regression(seed):
    """Ridge-like regression on a table, by SGD: nothing to clip."""
    generator = seeded(seed)
    x, target = table("diabetes")
    target = ((target - target.mean()) / target.std()).float()[:, None]
    model = nn.Linear(10, 1)

    def loss():
        rows = _batches(len(x), 64, generator)
        return 0.25 * nn.functional.mse_loss(model(x[rows]), target[rows])

    return Workload(model, torch.optim.SGD(model.parameters(), lr=0.05), loss, 1000)


def cnn_too_fast(seed):
    """A convolutional network whose learning rate is far too high."""
    return _classifier(
        _convolutional, lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.9), seed, 800
    )
