"""Autocast: leaving it where half precision would spoil a result, and following it where it does not know an op."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations keep the dtypes of their arguments; the meta device has no autocast to leave."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives x in a matrix product: its own outside autocast, in float64 and on meta."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def as_in_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the dtype that autocast gives them in a matrix product."""
    return [t.to(autocast_dtype(t)) for t in tensors]
