"""Devices: by name, and what can be done on them."""

import shutil
from typing import TYPE_CHECKING

from t5lib.utils.errors import T5Error

if TYPE_CHECKING:
    import torch


def usable_device(name: "str | torch.device", called: str = "device") -> "torch.device":
    """The device of that name. Raises T5Error, with `called` for the setting's name, where it cannot be used."""
    import torch  # here: commands that only read settings start without it

    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:  # torch takes any number, and means the only one there is
            raise RuntimeError("a machine has one cpu, without a number")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise T5Error(f"{called} {name} cannot be used ({reason}); expected cpu, cuda or cuda:1") from None
    return device


def can_compile(device: "torch.device") -> bool:
    """Whether torch.compile makes kernels of its own for a device: CUDA with Triton, which needs a C compiler."""
    from torch.utils._triton import has_triton

    return device.type == "cuda" and has_triton() and any(map(shutil.which, ("cc", "gcc", "clang")))
