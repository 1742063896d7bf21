"""Networks of the second set that see images: the digits, and a game of falling balls."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import torch
from torch import nn

from workloads.images import _batches, _classifier, digits
from workloads.workload import Workload, seeded


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut (He et al. 2016)."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(seed, steps=600, batch=64):
    """A residual network by SGD with a cosine, on digits moved by up to a pixel."""
    generator = seeded(seed)
    x, labels = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, 16), Residual(16, 32, 2), Residual(32, 32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip

    def loss():
        rows = _batches(len(x), batch, generator)
        down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
        moved = nn.functional.pad(x[rows], (1, 1, 1, 1))[..., down : down + 8, right : right + 8]
        return nn.functional.cross_entropy(model(moved), labels[rows])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return Workload(model, optimizer, loss, steps,
                    schedule=lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))  # fmt: skip


class UNet(nn.Module):
    """Down to a quarter and up again, with what was seen on the way (Ronneberger et al. 2015)."""

    def __init__(self, width=12):
        super().__init__()
        self.first = self._twice(1, width)
        self.second = self._twice(width, 2 * width)
        self.bottom = self._twice(2 * width, 4 * width)
        self.lift_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up_second = self._twice(4 * width, 2 * width)
        self.lift_first = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up_first = self._twice(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _twice(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        first = self.first(x)
        second = self.second(nn.functional.max_pool2d(first, 2))
        bottom = self.bottom(nn.functional.max_pool2d(second, 2))
        up = self.up_second(torch.cat([self.lift_second(bottom), second], 1))
        return self.head(self.up_first(torch.cat([self.lift_first(up), first], 1)))


def unet(seed, steps=600, batch=32):
    """A U-Net that takes the noise off the digits, by Adam: small errors, nothing to clip."""
    generator = seeded(seed)
    x, model = digits()[0], UNet()

    def loss():
        clean = x[_batches(len(x), batch, generator)]
        noisy = clean + 0.3 * torch.randn(clean.shape, generator=generator)
        return nn.functional.mse_loss(model(noisy), clean)

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps)


def triplets(seed, steps=800, batch=48):
    """A digit lies nearer to its like than to another, by a margin (Schroff et al. 2015)."""
    generator = seeded(seed)
    x, labels = digits()
    alike = [torch.nonzero(labels == digit)[:, 0] for digit in range(10)]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.PReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.PReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.PReLU(), nn.Linear(64, 2),
    )  # fmt: skip

    def one_of(digit):
        return alike[digit][_batches(len(alike[digit]), 1, generator)]

    def loss():
        anchor = _batches(len(x), batch, generator)
        others = (labels[anchor] + torch.randint(1, 10, (batch,), generator=generator)) % 10
        positive = torch.cat([one_of(digit) for digit in labels[anchor].tolist()])
        negative = torch.cat([one_of(digit) for digit in others.tolist()])
        places = model(x[torch.cat([anchor, positive, negative])]).split(batch)
        return nn.functional.triplet_margin_loss(*places, margin=1.0)

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps,
                    schedule=lambda step: 0.1 ** (step // (0.4 * steps)))  # fmt: skip


class Patches(nn.Module):
    """A transformer's encoder over patches of 2 × 2 (Dosovitskiy et al. 2021)."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(17, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x):
        patches = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.place
        return self.head(self.body(x)[:, 0])


def vit_too_fast(seed):
    """A vision transformer whose learning rate is hundreds of times what is usual."""
    return _classifier(Patches, lambda p: torch.optim.AdamW(p, lr=0.3), seed, 600)


class Catch:
    """Balls that fall ten rows, one game each, and a paddle below them (Osband et al. 2020)."""

    def __init__(self, games, seed, rows=10, columns=5):
        self.random = np.random.default_rng(seed)
        self.rows, self.columns, self.caught = rows, columns, []
        self.column, self.paddle = self.random.integers(columns, size=games), np.full(games, 2)
        self.row = self.random.integers(rows - 1, size=games)

    def seen(self):
        """One row of pixels a game."""
        games = np.arange(len(self.row))
        screen = np.zeros((len(games), self.rows, self.columns), np.float32)
        screen[games, self.row, self.column] = screen[games, -1, self.paddle] = 1
        return torch.from_numpy(screen.reshape(len(games), -1))

    def move(self, action):
        """0 is left, 1 stays, 2 is right. What is then seen, the rewards, which games are over."""
        self.paddle = np.clip(self.paddle + action - 1, 0, self.columns - 1)
        self.row += 1
        after, over = self.seen(), self.row == self.rows - 1
        caught = self.paddle == self.column
        self.caught.extend(caught[over])
        self.row[over], self.paddle[over] = 0, self.columns // 2
        self.column[over] = self.random.integers(self.columns, size=over.sum())
        reward = np.where(over, np.where(caught, 1.0, -1.0), 0.0).astype(np.float32)
        return after, torch.from_numpy(reward), torch.from_numpy(over)


@dataclasses.dataclass
class Replay:
    """The latest moves; from the beginning again when it is full."""

    size: int = 10_000
    moves: list = dataclasses.field(default_factory=list)
    added: int = 0

    def add(self, *columns):
        for move in zip(*columns, strict=True):
            self.moves[self.added % self.size : self.added % self.size + 1] = [move]
            self.added += 1

    def sample(self, batch, generator):
        rows = _batches(len(self.moves), batch, generator).tolist()
        return map(torch.stack, zip(*(self.moves[row] for row in rows), strict=True))


def dqn(seed, steps=1500, games=8, batch=32, discount=0.99):
    """Deep Q-learning with replay, a target network and Huber's loss (Mnih et al. 2015)."""
    generator = seeded(seed)
    model = nn.Sequential(
        nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    target, game, replay = copy.deepcopy(model), Catch(games, seed), Replay()
    step = -1

    def play():
        before = game.seen()
        with torch.no_grad():
            action = model(before).argmax(1)
        stray = torch.rand(games, generator=generator) < max(0.05, 1 - 2 * step / steps)
        action = torch.where(stray, torch.randint(0, 3, (games,), generator=generator), action)
        replay.add(before, action, *game.move(action.numpy()))

    def loss():
        nonlocal step
        step += 1
        if step % 100 == 0:
            target.load_state_dict(model.state_dict())
        play()
        before, action, after, reward, over = replay.sample(batch, generator)
        with torch.no_grad():
            worth = reward + discount * target(after).amax(1) * ~over
        said = model(before).gather(1, action[:, None])[:, 0]
        return nn.functional.smooth_l1_loss(said, worth)

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps,
                    score=lambda: 1 - float(np.mean(game.caught[-300:])), loss_tells=False)  # fmt: skip
