"""Several optimizers in one process, as a GAN has them: two runs of one job, one exporter."""

import math
import sqlite3
import urllib.request

import pytest
import torch
from loops import parameters_equal
from prometheus_client.parser import text_string_to_metric_families
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from gradwatch import Agent, ClipNorm, ClipValue

ROUNDS = 6  # of two steps of the discriminator and one of the generator


def networks():
    """A generator and a discriminator with their optimizers."""
    torch.manual_seed(0)
    generator = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    discriminator = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    return (
        (generator, torch.optim.AdamW(generator.parameters(), lr=0.01)),
        (discriminator, torch.optim.SGD(discriminator.parameters(), lr=0.1, momentum=0.9)),
    )


def play(generator, g_step, discriminator, d_step):
    """Train them against each other; `g_step` and `d_step` clip and step."""
    torch.manual_seed(1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for _ in range(ROUNDS):
        for _ in range(2):
            discriminator.zero_grad()
            real = discriminator(torch.randn(16, 2) + 3)
            fake = discriminator(generator(torch.randn(16, 4)).detach())
            loss = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
            (5 * loss).backward()
            d_step()
        generator.zero_grad()
        fake = discriminator(generator(torch.randn(16, 4)))  # the discriminator gets gradients too
        (5 * bce(fake, torch.ones_like(fake))).backward()
        g_step()


def reference():
    """The same clipped by torch; both networks, and the norms before clipping."""
    (generator, g), (discriminator, d) = networks()
    g_norms, d_norms = [], []

    def g_step():
        g_norms.append(float(clip_grad_norm_(generator.parameters(), 0.5)))
        g.step()

    def d_step():
        d_norms.append(float(clip_grad_norm_(discriminator.parameters(), math.inf)))
        clip_grad_value_(discriminator.parameters(), 0.3)
        d.step()

    play(generator, g_step, discriminator, d_step)
    return generator, g_norms, discriminator, d_norms


def steps_of(name):
    """The norms of a run by its name, from the store."""
    with sqlite3.connect("gradwatch.db") as connection:
        rows = connection.execute(
            "SELECT pre_norm, clipped FROM steps JOIN runs ON runs.id = run_id WHERE name = ?"
            " ORDER BY step",
            (name,),
        ).fetchall()
    return [norm for norm, _ in rows], sum(clipped for _, clipped in rows)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("gan", "gan"), ("gan-2", "gan")),  # the discriminator steps first
        (("faker", "critic"), ("faker", "critic")),
    ],
)
def test_two_optimizers_are_two_runs_of_one_job(given, names, monkeypatch):
    """Each clipped by its own policy, as torch clips; each in the store and in one exporter."""
    monkeypatch.setenv("GRADWATCH_FOLD", "0")
    (generator, g), (discriminator, d) = networks()
    one = Agent(g, model=generator, clip=ClipNorm(0.5), run=given[0])
    two = Agent(d, model=discriminator, clip=ClipValue(0.3), run=given[1])
    play(generator, g.step, discriminator, d.step)
    generator_too, g_norms, discriminator_too, d_norms = reference()
    assert parameters_equal(generator, generator_too)
    assert parameters_equal(discriminator, discriminator_too)
    assert one.flush()
    assert two.flush()

    with sqlite3.connect("gradwatch.db") as connection:
        runs = dict(connection.execute("SELECT name, uid FROM runs").fetchall())
        (jobs,) = connection.execute("SELECT count(DISTINCT job) FROM runs").fetchone()
    assert runs == dict(zip(names, (one.run_id, two.run_id), strict=True))
    assert jobs == 1
    g_stored, g_clipped = steps_of(names[0])
    d_stored, d_clipped = steps_of(names[1])
    assert g_stored == pytest.approx(g_norms, rel=1e-5)
    assert d_stored == pytest.approx(d_norms, rel=1e-5)
    assert g_clipped == sum(norm > 0.5 for norm in g_norms) > 0
    assert d_clipped > 0

    assert one.metrics_url == two.metrics_url
    with urllib.request.urlopen(one.metrics_url, timeout=5) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    exported = {
        (sample.name, sample.labels["run"]): sample.value
        for family in families
        for sample in family.samples
        if "run" in sample.labels
    }
    for name, steps, clipped in zip(
        names, (ROUNDS, 2 * ROUNDS), (g_clipped, d_clipped), strict=True
    ):
        assert exported["gradwatch_steps_total", name] == steps
        assert exported["gradwatch_clipped_steps_total", name] == clipped
