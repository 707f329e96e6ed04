"""A Prefect server for the tests of flows."""

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.process import environment
from tasks import targets
from tasks.runtime import tracking, warm


@pytest.fixture(scope="session")
def prefect():
    """It takes ten seconds to start; all tests that need it run in one process (xdist_group)."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def libraries_loaded():
    """Flows find a process that has imported what stages need; with one of its own each takes seven seconds more."""
    loading = warm.serving(targets.libraries({}), environment(tracking.DEFAULTS))
    with loading as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield
