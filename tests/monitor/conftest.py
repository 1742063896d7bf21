"""Stores of either kind."""

import itertools

import pytest


@pytest.fixture(params=["sqlite", "postgres"])
def new_store(request, tmp_path):
    """Makes URLs of new stores, of either kind."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres_server").new_database
    names = itertools.count()
    return lambda: f"sqlite:///{tmp_path}/{next(names)}.db"
