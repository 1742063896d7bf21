"""Jobs in processes of their own, for all faults."""

import pytest
from jobs import Factory


@pytest.fixture(scope="session")
def factory():
    """Forks jobs; torch is loaded once."""
    factory = Factory()
    yield factory
    factory.stop()
