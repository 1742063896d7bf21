"""Training jobs small enough to be run hundreds of times, on real data or classic tasks.

Each is a function `(seed) -> Workload`. What a recommendation was tuned on (`TUNING`) is never
what it is reported on (`REPORTED`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from workloads import carts, images, sequences, text
from workloads.workload import Workload, ended, train

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["REPORTED", "TUNING", "Job", "Workload", "ended", "train"]


@dataclasses.dataclass(frozen=True)
class Job:
    """How to make it from a seed, and the verdict on its run at 1.0, labelled before any was given.

    A job that is made to go wrong is `fix_training`; the other labels are what `labels.py` measured.
    """

    make: Callable[[int], Workload]
    expected: str = ""


REPORTED = {
    "tanh RNN, temporal order": Job(sequences.rnn_order, "fix_training"),
    "LSTM, adding": Job(sequences.lstm_adding, "keep"),
    "char-LSTM, source text": Job(text.char_lstm, "use_policy"),
    "GPT, source text": Job(text.gpt, "use_policy"),
    "BiLSTM with attention, digits": Job(images.bilstm, "use_policy"),
    "CNN, digits": Job(images.cnn, "keep"),
    "VAE, digits": Job(images.vae, "use_policy"),
    "GRU, sunspots": Job(sequences.gru_sunspots, "not_needed"),
    "actor-critic, cart and pole": Job(carts.actor_critic, "use_policy"),
    "perceptron, too high a rate": Job(images.too_fast, "fix_training"),
    "logistic regression, table": Job(images.calm, "not_needed"),
    "perceptron, survey": Job(images.perceptron_survey, "keep"),
    "transformer, El Niño": Job(sequences.transformer_elnino, "change"),
}

TUNING = {
    make.__name__: Job(make)
    for make in (
        sequences.rnn_adding,
        sequences.gru_order,
        sequences.lstm_co2,
        sequences.rnn_sunspots,
        text.char_gru,
        text.char_convolutions,
        text.gpt_plain,
        text.char_lstm_too_fast,
        images.perceptron,
        images.cnn_normed,
        images.encoder,
        images.autoencoder,
        images.contrastive,
        images.tabular,
        images.calm_regression,
        images.cnn_too_fast,
        carts.reinforce,
    )
}
