"""A Prefect server for the tests of flows."""

import pytest
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="session")
def prefect():
    """It takes ten seconds to start; all tests that need it run in one process (xdist_group)."""
    with prefect_test_harness(server_startup_timeout=120):
        yield
