import pytest
import triton_device  # noqa: F401  (before any test module imports the kernels)


@pytest.fixture(autouse=True, scope="module")
def on_one_thread(one_thread):
    """Tensors are tiny in all of these tests."""
