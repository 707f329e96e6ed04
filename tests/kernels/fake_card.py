"""CUDA tensors without a card: they have a device, a dtype and a shape, and no data."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from t5kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    """Collects the names of our own ops, which stand for the kernels."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "t5kernels":
            self.ops.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_card(major=9):
    """CUDA tensors made inside are on a card of this major version. It yields a list that gets the names of our ops."""
    if torch.cuda.is_available():
        torch.cuda.init()  # which asks for properties that the card below does not have
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), _Recorder() as recorder:
        patch.setattr(launch, "INTERPRETED", False)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
        yield recorder.ops
