"""Autocast: leaving it where half precision would spoil a result, following it where an op knows nothing of it."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations keep the dtypes they are given; the meta device has no autocast to leave."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives x in a matrix product: its own outside autocast, in float64 and on meta."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
