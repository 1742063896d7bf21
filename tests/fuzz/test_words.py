"""Words that people choose: names of runs, tags and parameters, and arguments of the command line."""

import json

import fuzzing
import torch
from fuzzing import JSONS, NUMBERS, TEXTS, check_answer, shown
from hypothesis import given
from hypothesis import strategies as st

import gradwatch
from gradwatch.errors import ConfigurationError

WORDS = TEXTS | NUMBERS.map(str) | st.sampled_from(["\udcff", "--", "--json", "a" * 300])
VERBS = st.sampled_from(
    [
        ("runs",), ("show",), ("show", "--store"), ("recommend", "good", "--target"), ("diagnose",),
        ("report", "good", "-o"), ("apply", "changed", "--timeout", "0"), ("apply",),
        ("apply", "changed", "--no-wait", "--policy"), ("apply", "changed", "0.7", "--no-wait", "--reason"),
        ("recover",), ("recover", "--store"), ("doctor", "--store"), ("store", "check", "--store"),
        ("store", "copy"), ("store", "migrate", "--store"), ("store", "prune", "--older-than"),
        ("grafana", "push", "--dry-run", "--url"), ("runs", "--limit"), ("monitor", "--port"),
        ("monitor", "--interval"), ("ui", "--port"), ("demo", "--epochs"), (), ("--debug",),
    ]
)  # fmt: skip


def test_arguments(run, copy, budget, monkeypatch):
    """Every verb with words that it does not expect."""
    copy()
    monkeypatch.setenv("GRAFANA_TOKEN", "x")

    @given(VERBS, st.lists(WORDS, min_size=1, max_size=2))
    def check(verb, words):
        arguments = [*verb, *words]
        if any("\0" in word for word in words):
            return  # no system passes it on
        check_answer(arguments, *run(*arguments))

    budget.spend(0.05, check)
    copy()


def test_names(run, copy, budget, monkeypatch):
    """What a job may call itself it is called everywhere; anything else is refused at once."""
    monkeypatch.setenv("GRADWATCH_STORE", "gradwatch.db")
    tags = st.dictionaries(TEXTS, JSONS, max_size=2)
    names = st.lists(
        TEXTS.filter(lambda name: name and "." not in name), min_size=2, max_size=2, unique=True
    )

    @given(TEXTS, TEXTS, tags, names)
    def check(name, job, tags, names):
        path = copy()
        model = torch.nn.Module()
        for parameter in names:
            model.register_parameter(parameter, torch.nn.Parameter(torch.ones(2)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            agent = gradwatch.Agent(
                optimizer, model=model, run=name, tags=tags, store="gradwatch.db"
            )
        except ConfigurationError:
            assert not name or "\0" in name or len(name) > 240
            return
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full((2,), float("nan") if step == 1 else 0.1)
            optimizer.step()
        assert agent.flush()
        agent.close()
        with fuzzing.connected(path) as connection:
            ((stored,),) = connection.execute("SELECT name FROM runs ORDER BY id DESC LIMIT 1")
        status, out, _ = run("runs", "--json", "--limit", "1")
        assert (status, json.loads(out)[0]["name"]) == (0, stored)
        for verb in ("show", "diagnose", "recommend"):
            arguments = (verb, f"uid:{agent.run_id}")
            check_answer(arguments, *run(*arguments))
        shown("run.py", run=f"uid:{agent.run_id}")

    budget.spend(0.07, check)
