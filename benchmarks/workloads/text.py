"""Language models on real text that every Python has: the source of its own modules."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path

import torch
from torch import nn

from workloads.workload import Workload, seeded


@functools.cache
def characters(*modules):
    """The text of a few modules as numbers, and how many there are."""
    text = "".join(Path(importlib.util.find_spec(name).origin).read_text() for name in modules)
    alphabet = sorted(set(text))
    places = {character: place for place, character in enumerate(alphabet)}
    return torch.tensor([places[c] for c in text]), len(alphabet)


CODE = ("argparse", "ast", "inspect", "statistics", "textwrap", "typing")
OTHER = ("tarfile", "zipfile", "ftplib", "locale", "pydoc")


def _rows(text, length, batch):
    starts = torch.randint(0, len(text) - length - 1, (batch,)).tolist()
    return torch.stack([text[s : s + length + 1] for s in starts])


class Recurrent(nn.Module):
    """Embedding, recurrent body, scores."""

    def __init__(self, size, kind, embedding, hidden):
        super().__init__()
        self.embed = nn.Embedding(size, embedding)
        self.body = kind(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, size)

    def forward(self, x):
        return self.head(self.body(self.embed(x))[0])


class Block(nn.Module):
    """Attention to what came before, then a feed-forward layer, each after a norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.mix(self.before(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.between(x))


class GPT(nn.Module):
    """A small decoder (Radford et al. 2019)."""

    def __init__(self, size, length, width, depth, heads=4):
        super().__init__()
        self.embed, self.place = nn.Embedding(size, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x):
        x = self.embed(x) + self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Convolutional(nn.Module):
    """Causal convolutions of growing reach."""

    def __init__(self, size, width, depth):
        super().__init__()
        self.embed = nn.Embedding(size, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(depth))
        self.head = nn.Linear(width, size)

    def forward(self, x):
        x = self.embed(x).transpose(1, 2)
        for layer in self.layers:
            shifted = nn.functional.pad(x, (layer.dilation[0], 0))
            x = x + torch.relu(layer(shifted))
        return self.head(x.transpose(1, 2))


def _language(
    modules, model, optimizer, seed, steps, length=40, batch=8, schedule=None, total=False
):
    """The next character; `total`: the loss is summed over a row, as in Zaremba et al. 2014."""
    seeded(seed)
    text, size = characters(*modules)
    model = model(size)

    def loss():
        rows = _rows(text, length, batch)
        mean = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        return length * mean if total else mean

    return Workload(model, optimizer(model.parameters()), loss, steps, schedule=schedule)


def warmed(warmup, steps):
    """Linear warm-up, then half a cosine down to a tenth."""

    def share(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))

    return share


def _adamw(lr):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=True)


def char_lstm(seed):
    """A character LSTM by SGD, its loss summed over time (Zaremba et al. 2014)."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    return _language(CODE, lambda n: Recurrent(n, nn.LSTM, 48, 96), sgd, seed, 1000, total=True)


def gpt(seed):
    """A small GPT with warm-up and cosine decay."""
    return _language(
        CODE, lambda n: GPT(n, 40, 64, 2), _adamw(2e-3), seed, 800, schedule=warmed(100, 800)
    )


# -- to tune on ----------------------------------------------------------------------------------


def char_gru(seed):
    """A character GRU, by SGD."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)

    return _language(OTHER, lambda n: Recurrent(n, nn.GRU, 32, 64), sgd, seed, 800)


def char_convolutions(seed):
    """Causal convolutions."""
    return _language(OTHER, lambda n: Convolutional(n, 64, 5), _adamw(2e-3), seed, 800)


def gpt_plain(seed):
    """A narrower, deeper GPT at a constant rate."""
    return _language(OTHER, lambda n: GPT(n, 40, 48, 3), _adamw(1e-3), seed, 800)


def char_lstm_too_fast(seed):
    """A character LSTM whose learning rate is far too high."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=20.0, momentum=0.9)

    return _language(OTHER, lambda n: Recurrent(n, nn.LSTM, 32, 64), sgd, seed, 800)
