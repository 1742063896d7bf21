"""The dashboard's pages on stores of which cells were written over: each shows what there is."""

import pytest
from fuzzing import TEXTS, mutations, shown
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setenv("GRADWATCH_STORE", "gradwatch.db")


def test_pages(copy, whole_store, budget):
    """The list of runs, and each run's page by name, by id and by whatever an address may say."""

    @given(mutations(whole_store), st.sampled_from(["good", "long", "changed", "2"]) | TEXTS)
    def check(mutations, run):
        copy(mutations)
        shown("runs.py")
        shown("run.py", run=run)

    budget.spend(0.15, check)
