"""A database of the test's own on a real PostgreSQL."""

import pytest


@pytest.fixture
def url(postgres_server):
    """An empty database's URL."""
    return postgres_server.new_database()


@pytest.fixture
def query(postgres_server, url):
    """Rows of that database, by psycopg itself."""
    return lambda sql, *arguments: postgres_server.query(url, sql, *arguments)
