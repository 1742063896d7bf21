"""Sequences of the third set: source text, words, strips of digits, two series, carts and poles."""

from __future__ import annotations

import collections
import functools
import importlib.util
import io
import keyword
import re
import tokenize
from pathlib import Path

import numpy as np
import torch
from statsmodels.datasets import elec_equip
from torch import nn

from workloads.carts import _advantage, _Balancing
from workloads.images import _batches, digits
from workloads.more_sequences import BEGIN, PAD, Sorter, _reversed, identifiers
from workloads.sequences import Last, series
from workloads.text import Recurrent, _rows, characters, warmed
from workloads.workload import Workload, seeded

MODULES = ("configparser", "csv", "difflib", "shlex", "smtplib")
KINDS = {tokenize.NAME: 1, tokenize.OP: 2, tokenize.STRING: 3, tokenize.COMMENT: 4}


def masked(seed, steps=650, batch=20):
    """Hidden letters of words, by a transformer that reads both ways (Devlin et al. 2019)."""
    generator = seeded(seed)
    words = identifiers()
    model = Sorter(30, words.shape[1])

    def loss():
        rows = words[_batches(len(words), batch, generator)]
        hidden = (torch.rand(rows.shape, generator=generator) < 0.15) & (rows != PAD)
        said = model(rows.masked_fill(hidden, 29))
        return nn.functional.cross_entropy(said[hidden], rows[hidden])

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    return Workload(model, optimizer, loss, steps, schedule=warmed(65, steps))


@functools.cache
def source():
    """The text of some modules."""
    return "".join(Path(importlib.util.find_spec(name).origin).read_text() for name in MODULES)


@functools.cache
def kinds():
    """What each character is part of: a space, name, sign, string, comment, keyword, or the rest."""
    begins = np.cumsum([0, *map(len, source().splitlines(keepends=True))])
    marked = torch.zeros(begins[-1], dtype=torch.int64)
    for token in tokenize.generate_tokens(io.StringIO(source()).readline):
        (row, start), (last_row, end) = token.start, token.end
        if token.string.strip():
            kind = 5 if keyword.iskeyword(token.string) else KINDS.get(token.type, 6)
            marked[begins[row - 1] + start : begins[last_row - 1] + end] = kind
    return marked


def tagger(seed, steps=400, length=20, batch=16):
    """A bidirectional GRU tells names, strings, comments and the like in source text, by NAdam."""
    seeded(seed)
    text, size = characters(*MODULES)
    both = torch.stack([text, kinds()], 1)
    model = Recurrent(size, functools.partial(nn.GRU, bidirectional=True), 24, 32)
    model.head = nn.Linear(64, 7)

    def loss():
        x, y = _rows(both, length, batch).unbind(-1)
        return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return Workload(model, torch.optim.NAdam(model.parameters(), lr=2e-3), loss, steps)


def feed_forward(seed, steps=1500, seen=10, batch=64):
    """The first neural language model (Bengio et al. 2003): SGD with momentum on a batch's sum."""
    seeded(seed)
    text, size = characters(*MODULES)
    model = nn.Sequential(
        nn.Embedding(size, 24), nn.Flatten(), nn.Linear(24 * seen, 256), nn.Tanh(),
        nn.Linear(256, size),
    )  # fmt: skip

    def loss():
        rows = _rows(text, seen, batch)
        return nn.functional.cross_entropy(model(rows[:, :-1]), rows[:, -1], reduction="sum")

    return Workload(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), loss, steps)


class Strip(nn.Module):
    """A convolution over the columns, then a recurrent network both ways (Shi et al. 2017)."""

    def __init__(self, width=32, hidden=32):
        super().__init__()
        self.look = nn.Sequential(nn.Conv1d(8, width, 5, 2, 2), nn.BatchNorm1d(width), nn.ReLU())
        self.body = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 11)

    def forward(self, x):
        return self.head(self.body(self.look(x).transpose(1, 2))[0]).log_softmax(-1)


def strips(seed, steps=800, batch=16, count=4):
    """Four digits in a row, read without being told where: CTC (Graves 2006), summed, by RMSprop."""
    generator = seeded(seed)
    (x, labels), model = digits(), Strip()
    lengths = torch.full((batch,), count)

    def loss():
        rows = _batches(len(x), batch * count, generator)
        strip = x[rows, 0].view(batch, count, 8, 8).transpose(1, 2).reshape(batch, 8, -1)
        said, digit = model(strip).transpose(0, 1), labels[rows].view(batch, count)
        columns = torch.full((batch,), len(said))
        return nn.functional.ctc_loss(said, digit + 1, columns, lengths, reduction="sum")

    return Workload(model, torch.optim.RMSprop(model.parameters(), lr=1e-3), loss, steps)


@functools.cache
def neighbours(reach=3, least=4):
    """The words of some modules, each with one near it, and how often each word comes."""
    words = re.findall("[a-z]+", source().lower())
    known = {word: count for word, count in collections.Counter(words).items() if count >= least}
    places = {word: place for place, word in enumerate(known)}
    row = torch.tensor([places[word] for word in words if word in places])
    pairs = torch.cat([torch.stack([row[by:], row[:-by]], 1) for by in range(1, reach + 1)])
    return torch.cat([pairs, pairs.flip(1)]), torch.tensor([*known.values()])


def skipgram(seed, steps=1500, batch=256, others=5, width=48):
    """Word vectors by skip-grams and negative samples (Mikolov et al. 2013), summed, by Adagrad."""
    generator = seeded(seed)
    pairs, counts = neighbours()
    model = nn.ModuleList(nn.Embedding(len(counts), width) for _ in range(2))
    nn.init.uniform_(model[0].weight, -0.5 / width, 0.5 / width)
    nn.init.zeros_(model[1].weight)
    sign = torch.tensor([1.0] + others * [-1.0])

    def loss():
        middle, near = pairs[_batches(len(pairs), batch, generator)].unbind(1)
        far = torch.multinomial(counts**0.75, batch * others, True, generator=generator)
        said = torch.cat([near[:, None], far.view(batch, others)], 1)
        alike = (model[1](said) @ model[0](middle)[..., None])[..., 0]
        return -nn.functional.logsigmoid(sign * alike).sum()

    return Workload(model, torch.optim.Adagrad(model.parameters(), lr=0.1), loss, steps)


class Words(nn.Module):
    """A variational autoencoder of words, recurrent on both sides (Bowman et al. 2016)."""

    def __init__(self, letters=29, embedding=24, hidden=48, latent=12):
        super().__init__()
        self.embed = nn.Embedding(letters, embedding, padding_idx=PAD)
        self.encode = Last(nn.LSTM(embedding, hidden, batch_first=True), 2 * latent)
        self.decode = nn.LSTM(embedding + latent, hidden, batch_first=True)
        self.head = nn.Linear(hidden, letters)

    def forward(self, words, read):
        mean, log_variance = self.encode(self.embed(words)).chunk(2, -1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        away = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1)
        beside = latent[:, None].expand(-1, read.shape[1], -1)
        return self.head(self.decode(torch.cat([self.embed(read), beside], -1))[0]), away


def word_vae(seed, steps=750, batch=32):
    """Words to vectors and back, in nats a word; the price of the vectors comes in bit by bit."""
    generator = seeded(seed)
    words, model, step = identifiers(), Words(), 0

    def loss():
        nonlocal step
        step += 1
        rows = words[_batches(len(words), batch, generator)]
        read, said = _reversed(rows)
        scores, away = model(rows, read.where(torch.rand(read.shape) > 0.2, BEGIN))
        nats = nn.functional.cross_entropy(
            scores.transpose(1, 2), said, ignore_index=PAD, reduction="sum"
        )
        return nats / batch + min(1, step / steps) * away.mean()

    return Workload(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss, steps)


def gru_production(seed, steps=1000, batch=32, length=18):
    """Next month's sales of electrical equipment, errors squared in the index's points, by Nesterov."""
    generator = seeded(seed)
    made = torch.tensor(elec_equip.load_pandas().data.iloc[:, 0].to_numpy(), dtype=torch.float32)
    windows, model = made.unfold(0, length + 1, 1), Last(nn.GRU(1, 32, batch_first=True), 1)

    def loss():
        rows = windows[_batches(len(windows), batch, generator)]
        said = 100 + model((rows[:, :-1, None] - 100) / 10)
        return nn.functional.mse_loss(said, rows[:, -1:])

    optimizer = torch.optim.SGD(model.parameters(), lr=7e-4, momentum=0.9, nesterov=True)
    return Workload(model, optimizer, loss, steps)


def quantiles(seed, steps=1500, batch=128, length=36, ahead=12):
    """Three quantiles of the sea's temperature in each month of a year ahead: nothing to clip."""
    generator = seeded(seed)
    windows, shares = series("elnino").unfold(0, length + ahead, 1), torch.tensor([0.1, 0.5, 0.9])
    model = nn.Sequential(nn.Linear(length, 96), nn.SiLU(), nn.Linear(96, 3 * ahead))

    def loss():
        rows = windows[_batches(len(windows), batch, generator)]
        seen, after = rows.split([length, ahead], 1)
        short = after[..., None] - model(seen).unflatten(1, (ahead, 3))
        return torch.maximum(shares * short, (shares - 1) * short).mean()

    return Workload(model, torch.optim.RAdam(model.parameters(), lr=1e-3), loss, steps)


def proximal(seed, steps=1000, poles=16, length=64, passes=8):
    """Proximal policy optimisation (Schulman et al. 2017), its critic on the returns as they are."""
    generator = seeded(seed)
    model = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 2))
    job, moves, step = _Balancing(model, seed, poles, length), None, -1

    @torch.no_grad()
    def play():
        before, right, after, fell, over = job.moves()
        scores, values = model(before).unbind(-1)
        gain = _advantage(values, model(after)[..., 1] * ~fell, over)
        said = torch.distributions.Bernoulli(logits=scores).log_prob(right)
        return [part.flatten(0, 1) for part in (before, right, said, gain, values + gain)]

    def loss():
        nonlocal moves, step
        step += 1
        if step % passes == 0:
            moves = play()
        rows = _batches(poles * length, 256, generator)
        before, right, said, gain, worth = (part[rows] for part in moves)
        scores, values = model(before).unbind(-1)
        ratio = (torch.distributions.Bernoulli(logits=scores).log_prob(right) - said).exp()
        gain = (gain - gain.mean()) / gain.std()
        least = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        return 0.5 * nn.functional.mse_loss(values, worth) - least.mean()

    return Workload(model, torch.optim.Adam(model.parameters(), lr=2e-3, eps=1e-5), loss, steps,
                    job.score, loss_tells=False)  # fmt: skip
