import pytest
import torch
import triton_device  # noqa: F401  (before any test module imports the kernels)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are tiny here: a second thread would only wait, which takes processor time all the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
