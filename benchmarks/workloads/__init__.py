"""Training jobs small enough to be run hundreds of times, on real data or classic tasks.

Each is a function `(seed) -> Workload`. The rules were fitted on `TUNING`, and reported on `REPORTED`
and on further sets of other jobs, `SECOND`, `THIRD`, `FOURTH`: what a set taught after its first run
is told beside it, and what came of it reported on the next. Of the last two the jobs whose label is
not the same for two groups of five seeds have none.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from workloads import (
    carts,
    further_sequences,
    further_tables,
    images,
    more_images,
    more_sequences,
    more_tables,
    other_sequences,
    other_tables,
    sequences,
    text,
)
from workloads.workload import Workload, ended, train

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "FOURTH",
    "JOBS",
    "REPORTED",
    "SECOND",
    "THIRD",
    "TUNING",
    "Job",
    "Workload",
    "ended",
    "train",
]


@dataclasses.dataclass(frozen=True)
class Job:
    """How to make it from a seed, and the verdict on its run at 1.0, labelled before any was given.

    A job that is made to go wrong is `fix_training`; the other labels are what `labels.py` measured
    when they were made.
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

SECOND = {
    "ResNet, digits": Job(more_images.resnet, "use_policy"),
    "U-Net, noisy digits": Job(more_images.unet, "not_needed"),
    "triplets, digits": Job(more_images.triplets, "keep"),
    "vision transformer, too high a rate": Job(more_images.vit_too_fast, "fix_training"),
    "deep Q-learning, catch": Job(more_images.dqn, "not_needed"),
    "rectified RNN, pixel by pixel": Job(more_sequences.rnn_pixels, "fix_training"),
    "LSTM, copying": Job(more_sequences.lstm_copying, "use_policy"),
    "GRUs with attention, words reversed": Job(more_sequences.seq2seq, "use_policy"),
    "transformer, sorting": Job(more_sequences.sorter, "use_policy"),
    "char-GRU, source text": Job(more_sequences.char_rnn, "not_needed"),
    "Poisson perceptron, doctors' visits": Job(more_tables.poisson, "use_policy"),
    "wide logistic regression, survey": Job(more_tables.wide, "not_needed"),
    "temporal convolutions, economy": Job(more_tables.temporal_convolutions, "not_needed"),
    "mixture densities, sunspots": Job(more_tables.mixture, "use_policy"),
}

THIRD = {
    "transformer, hidden letters": Job(further_sequences.masked),
    "bidirectional GRU, kinds of tokens": Job(further_sequences.tagger, "keep"),
    "perceptron language model, source text": Job(further_sequences.feed_forward, "use_policy"),
    "CTC, strips of digits": Job(further_sequences.strips, "use_policy"),
    "skip-grams, source text": Job(further_sequences.skipgram, "use_policy"),
    "recurrent VAE, words": Job(further_sequences.word_vae),
    "GRU, sales in raw points": Job(further_sequences.gru_production, "use_policy"),
    "quantile perceptron, El Niño": Job(further_sequences.quantiles, "not_needed"),
    "proximal policy, cart and pole": Job(further_sequences.proximal),
    "sine network, photograph": Job(further_tables.siren, "use_policy"),
    "RealNVP, tumours": Job(further_tables.flow, "use_policy"),
    "binomial perceptron, schools": Job(further_tables.binomial, "use_policy"),
    "additive model, diabetes": Job(further_tables.additive, "change"),
    "matrix factorisation, births": Job(further_tables.factors, "use_policy"),
    "MLP-Mixer with mixup, digits": Job(further_tables.mixer, "use_policy"),
    "ArcFace, digits": Job(further_tables.arcface, "use_policy"),
    "quantile regression, food": Job(further_tables.quantiles, "not_needed"),
    "deep set, too high a rate": Job(further_tables.sums_too_fast, "fix_training"),
}

FOURTH = {
    "Elman network, words of source text": Job(other_sequences.elman, "use_policy"),
    "gated convolutions, source text": Job(other_sequences.gated, "not_needed"),
    "pointer network, sorting": Job(other_sequences.pointer, "use_policy"),
    "N-BEATS, four series in per cent": Job(other_sequences.nbeats),
    "GRU, brackets": Job(other_sequences.matching),
    "value iteration network, mazes": Job(other_sequences.planner, "use_policy"),
    "echo state network, Mackey-Glass": Job(other_sequences.echo, "not_needed"),
    "super-resolution, photograph": Job(other_tables.sharper, "not_needed"),
    "separable CNN, rotated photographs": Job(other_tables.rotations, "use_policy"),
    "diffusion, digits": Job(other_tables.diffusion),
    "capsules, digits": Job(other_tables.capsules, "not_needed"),
    "neural process, sine curves": Job(other_tables.process, "use_policy"),
    "choice model, journeys": Job(other_tables.choices, "use_policy"),
    "gated network, too high a rate": Job(other_tables.firms_too_fast, "fix_training"),
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

JOBS = {**REPORTED, **SECOND, **THIRD, **FOURTH, **TUNING}
