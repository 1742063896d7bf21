"""Sequences of the second set: symbols to copy, reverse and sort, pixels in a row, source text."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import torch
from torch import nn

from workloads.images import _classifier
from workloads.sequences import Last
from workloads.text import Recurrent, _language
from workloads.workload import Workload, seeded

MODULES = ("doctest", "imaplib", "mailbox", "optparse", "pdb")


def _copying(generator, batch=32, symbols=5, delay=10):
    """Symbols, a delay, a mark; then the symbols are to be said (Hochreiter, Schmidhuber 1997)."""
    said = torch.randint(1, 9, (batch, symbols), generator=generator)
    x, y = torch.zeros(2, batch, delay + 2 * symbols, dtype=torch.int64)
    x[:, :symbols], y[:, -symbols:] = said, said
    x[:, -symbols - 1] = 9
    return x, y


def lstm_copying(seed, steps=1600):
    """An LSTM on the copying task, by RMSprop (Arjovsky et al. 2016)."""
    generator = seeded(seed)
    model = Recurrent(10, nn.LSTM, 10, 64)

    def loss():
        x, y = _copying(generator)
        return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return Workload(model, torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.9), loss, steps)


class Pixels(nn.Module):
    """Rectified units that begin as a running sum, over an image's pixels in a row."""

    def __init__(self, hidden=64):
        super().__init__()
        body = nn.RNN(1, hidden, nonlinearity="relu", batch_first=True)
        nn.init.eye_(body.weight_hh_l0)
        for bias in (body.bias_ih_l0, body.bias_hh_l0):
            nn.init.zeros_(bias)
        self.last = Last(body, 10)

    def forward(self, x):
        return self.last(x.flatten(1)[..., None])


def rnn_pixels(seed):
    """A rectified RNN from the identity on, pixel by pixel: it explodes (Le et al. 2015)."""
    return _classifier(Pixels, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), seed, 700)


@functools.cache
def identifiers(longest=10):
    """The different words of five to ten small letters in some modules, as padded numbers from 3."""
    text = " ".join(Path(importlib.util.find_spec(name).origin).read_text() for name in MODULES)
    found = sorted(set(re.findall(rf"\b[a-z]{{5,{longest}}}\b", text)))
    words = torch.zeros(len(found), longest, dtype=torch.int64)
    for row, word in enumerate(found):
        words[row, : len(word)] = torch.tensor([ord(letter) - ord("a") + 3 for letter in word])
    return words


PAD, BEGIN, END = 0, 1, 2


def _reversed(words):
    """What the decoder reads and what it is to say: the letters from the last to the first."""
    read, said = torch.zeros(2, len(words), words.shape[1] + 1, dtype=torch.int64)
    lengths = (words != PAD).sum(1)
    for row, length in enumerate(lengths.tolist()):
        backwards = words[row, :length].flip(0)
        read[row, 0], read[row, 1 : length + 1] = BEGIN, backwards
        said[row, :length], said[row, length] = backwards, END
    return read, said


class Translator(nn.Module):
    """An encoder, and a decoder that attends to it (Luong et al. 2015)."""

    def __init__(self, letters=29, embedding=32, hidden=64):
        super().__init__()
        self.embed, self.drop = nn.Embedding(letters, embedding, padding_idx=PAD), nn.Dropout(0.1)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.decoder = nn.GRU(embedding, hidden, batch_first=True)
        self.weigh = nn.Linear(hidden, hidden, bias=False)
        self.mix, self.head = nn.Linear(2 * hidden, hidden), nn.Linear(hidden, letters)

    def forward(self, words, read):
        memory, state = self.encoder(self.drop(self.embed(words)))
        states, _ = self.decoder(self.drop(self.embed(read)), state)
        alike = self.weigh(states) @ memory.transpose(1, 2)
        weights = alike.masked_fill((words == PAD)[:, None], -1e9).softmax(-1)
        return self.head(torch.tanh(self.mix(torch.cat([weights @ memory, states], -1))))


def seq2seq(seed, steps=750, batch=32):
    """Words said backwards, by a recurrent encoder and decoder with attention."""
    generator = seeded(seed)
    words, model = identifiers(), Translator()

    def loss():
        rows = words[torch.randint(0, len(words), (batch,), generator=generator)]
        read, said = _reversed(rows)
        scores = model(rows, read).flatten(0, 1)
        return nn.functional.cross_entropy(scores, said.flatten(), ignore_index=PAD)

    return Workload(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, steps)


class Sorter(nn.Module):
    """A transformer's encoder, its norms after the layers (Vaswani et al. 2017)."""

    def __init__(self, numbers, length, width=48):
        super().__init__()
        self.embed, self.place = nn.Embedding(numbers, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, numbers)

    def forward(self, x):
        return self.head(self.body(self.embed(x) + self.place.weight))


def sorter(seed, steps=700, batch=32, numbers=10, length=8, warmup=200):
    """Eight numbers sorted by a transformer; warm-up, then the inverse square root."""
    generator = seeded(seed)
    model = Sorter(numbers, length)

    def loss():
        x = torch.randint(0, numbers, (batch, length), generator=generator)
        return nn.functional.cross_entropy(model(x).flatten(0, 1), x.sort(1).values.flatten())

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9)
    return Workload(model, optimizer, loss, steps,
                    schedule=lambda step: min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5))  # fmt: skip


def char_rnn(seed, steps=640):
    """Two layers of GRU on source text by RMSprop, as in Karpathy's char-rnn."""
    body = functools.partial(nn.GRU, num_layers=2, dropout=0.2)
    return _language(
        MODULES,
        lambda size: Recurrent(size, body, 32, 64),
        lambda p: torch.optim.RMSprop(p, lr=2e-3, alpha=0.95),
        seed,
        steps,
        length=25,
        batch=10,
        schedule=lambda step: 0.97 ** max(0, 20 * step // steps - 10),
    )
