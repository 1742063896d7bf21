"""Images and tables of a further set: patches of photographs, journeys, curves, firms."""

from __future__ import annotations

import functools

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from statsmodels.datasets import grunfeld, modechoice
from torch import nn

from workloads.images import _batches, digits
from workloads.more_tables import _standardised
from workloads.workload import Workload, seeded


@functools.cache
def patches(photograph, size=16):
    """Squares of a photograph at a quarter of its size, half of each the next one's; from 0 to 1."""
    image = torch.tensor(load_sample_images().images[photograph], dtype=torch.float32) / 255
    small = nn.functional.avg_pool2d(image.permute(2, 0, 1), 4)
    squares = small.unfold(1, size, size // 2).unfold(2, size, size // 2)
    return squares.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def sharper(seed, steps=800, batch=8):
    """Twice as fine a photograph by shuffled pixels (Shi et al. 2016): small errors, nothing to clip."""
    generator = seeded(seed)
    x = patches(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, padding=2), nn.Tanh(), nn.Conv2d(24, 16, 3, padding=1), nn.Tanh(),
        nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip

    def loss():
        fine = x[_batches(len(x), batch, generator)]
        return nn.functional.mse_loss(model(nn.functional.avg_pool2d(fine, 2)), fine)

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps)


def _separable(inputs, outputs, stride=1):
    """A convolution of each channel, then one across them."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs), nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


def rotations(seed, steps=600, batch=24):
    """Which way up is it? (Gidaris et al. 2018), by separable convolutions; smoothed labels."""
    generator = seeded(seed)
    x = torch.cat((patches(0), patches(1))) - 0.5
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), _separable(16, 32, 2), _separable(32, 48), nn.Flatten(),
        nn.Linear(768, 4),
    )  # fmt: skip

    def loss():
        quarters = x[_batches(len(x), batch, generator)].chunk(4)
        turned = torch.cat([rows.rot90(turn, (2, 3)) for turn, rows in enumerate(quarters)])
        said = torch.arange(4).repeat_interleave(batch // 4)
        return nn.functional.cross_entropy(model(turned), said, label_smoothing=0.1)

    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-4, momentum=0.5)
    return Workload(model, optimizer, loss, steps)


class Denoiser(nn.Module):
    """Says what noise was added to an image, given how much of it there is."""

    def __init__(self, pixels=64, width=160, waves=16):
        super().__init__()
        self.register_buffer("waves", 2.0 ** torch.linspace(0, 6, waves))
        self.enter = nn.Linear(pixels + 2 * waves, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()) for _ in range(3)
        )
        self.leave = nn.Linear(width, pixels)

    def forward(self, x, time):
        angles = time * self.waves
        hidden = self.enter(torch.cat((x, angles.sin(), angles.cos()), 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden)


def diffusion(seed, steps=900, batch=64):
    """Digits by denoising diffusion (Ho et al. 2020), the squared errors of an image summed."""
    generator = seeded(seed)
    x, model = 2 * digits()[0].flatten(1) - 1, Denoiser()

    def loss():
        clean = x[_batches(len(x), batch, generator)]
        time = torch.rand(batch, 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        angle = time * torch.pi / 2
        said = model(angle.cos() * clean + angle.sin() * noise, time)
        return (said - noise).square().sum(1).mean()

    return Workload(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, steps)


class Capsules(nn.Module):
    """Capsules vote for a vector a digit, and are routed to where they agree."""

    def __init__(self, count=32, inner=8, outer=8, digits=10):
        super().__init__()
        self.inner = inner
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, 2))
        self.votes = nn.Parameter(0.1 * torch.randn(count, digits, outer, inner))

    @staticmethod
    def squashed(x):
        """The same direction, the length between 0 and 1."""
        square = x.square().sum(-1, keepdim=True)
        return x * square / (1 + square) / (square + 1e-8).sqrt()

    def forward(self, x, rounds=3):
        """How long each digit's vector is."""
        low = self.squashed(self.body(x).flatten(2).unflatten(1, (-1, self.inner)).transpose(2, 3))
        votes = torch.einsum("ndoi,bni->bndo", self.votes, low.flatten(1, 2))
        logits = torch.zeros(votes.shape[:3])
        for _ in range(rounds):
            high = self.squashed((logits.softmax(2)[..., None] * votes).sum(1))
            logits = logits + (votes * high[:, None]).sum(-1).detach()
        return (high.square().sum(-1) + 1e-8).sqrt()


def capsules(seed, steps=500, batch=32):
    """Digits by capsules and dynamic routing, their margins summed (Sabour et al. 2017)."""
    generator = seeded(seed)
    (x, labels), model = digits(), Capsules()

    def loss():
        rows = _batches(len(x), batch, generator)
        length, right = model(x[rows]), nn.functional.one_hot(labels[rows], 10)
        short, long = (0.9 - length).relu().square(), (length - 0.1).relu().square()
        return (right * short + 0.5 * (1 - right) * long).sum(1).mean()

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps)


def process(seed, steps=800, batch=16, points=24, width=64):
    """Sine curves (Finn et al. 2017) from a few points, by a conditional neural process, in nats."""
    generator = seeded(seed)
    encoder = nn.Sequential(
        nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )
    decoder = nn.Sequential(
        nn.Linear(width + 1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 2),
    )  # fmt: skip
    model = nn.ModuleList((encoder, decoder))

    def loss():
        height, phase = torch.rand(2, batch, 1, 1, generator=generator)
        x = 10 * torch.rand(batch, points, 1, generator=generator) - 5
        y = (0.1 + 4.9 * height) * torch.sin(x - torch.pi * phase)
        seen = int(torch.randint(3, 11, (), generator=generator))
        curve = encoder(torch.cat((x, y), 2)[:, :seen]).mean(1, keepdim=True)
        mean, spread = decoder(torch.cat((curve.expand(-1, points, -1), x), 2)).chunk(2, 2)
        normal = torch.distributions.Normal(mean, 0.1 + 0.9 * nn.functional.softplus(spread))
        return -normal.log_prob(y).sum((1, 2)).mean()

    return Workload(model, torch.optim.Adamax(model.parameters(), lr=3e-3), loss, steps)


@functools.cache
def journeys():
    """210 travellers: what each of four ways is like for each of them, and which they chose."""
    data = modechoice.load_pandas().data
    measures = _standardised(data[["ttme", "invc", "invt", "gc", "hinc", "psize"]])
    chosen = torch.tensor(data["choice"].to_numpy().reshape(-1, 4).argmax(1))
    return torch.cat((measures.view(-1, 4, 6), torch.eye(4).expand(len(chosen), 4, 4)), 2), chosen


def choices(seed, steps=1500, batch=32):
    """Plane, train, bus or car: McFadden's choice model (1974) with a perceptron, summed, by SGD."""
    generator = seeded(seed)
    x, chosen = journeys()
    model = nn.Sequential(
        nn.Linear(10, 32), nn.Softplus(), nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 1)
    )

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.cross_entropy(model(x[rows])[..., 0], chosen[rows], reduction="sum")

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3)
    return Workload(model, optimizer, loss, steps)


@functools.cache
def firms():
    """Eleven firms from 1935 to 1954: worth, capital, year and firm; invested millions of dollars."""
    data = grunfeld.load_pandas().data
    measures = _standardised(np.column_stack((np.log(data[["value", "capital"]]), data["year"])))
    codes = torch.tensor(data["firm"].astype("category").cat.codes.to_numpy(), dtype=torch.int64)
    invested = torch.tensor(data["invest"].to_numpy(), dtype=torch.float32)
    return torch.cat((measures, nn.functional.one_hot(codes).float()), 1), invested


def firms_too_fast(seed, steps=1500, batch=32):
    """Firms' investments by gated layers; made to go wrong, its rate far too high."""
    generator = seeded(seed)
    x, invested = firms()
    model = nn.Sequential(
        nn.Linear(x.shape[1], 96), nn.GLU(), nn.Linear(48, 96), nn.GLU(), nn.Linear(48, 1)
    )

    def loss():
        rows = _batches(len(x), batch, generator)
        return nn.functional.mse_loss(model(x[rows])[:, 0], invested[rows])

    return Workload(model, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), loss, steps)
