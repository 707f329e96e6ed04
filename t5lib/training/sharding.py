"""FSDP2: weights, gradients, the optimizer's state and averaged weights in pieces, one on every process.

For a model that does not train on one card. Accelerate's plugin is not used: on a CPU, where the tests are, it would
quietly become DDP.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from t5lib.families import family_of
from t5lib.utils import processes


def wanted() -> bool:
    """Whether several processes are to hold a model in pieces."""
    return os.environ.get(processes.STRATEGY) == "fsdp2" and not processes.alone()


def sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` whose weights lie in pieces on the processes' devices; each block is gathered while it runs.
    The model itself goes to the CPU."""
    pieces = copy.deepcopy(model.cpu())
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in family_of(model).blocks(pieces):
        fully_shard(block, mesh=mesh)
    return fully_shard(pieces, mesh=mesh)


@torch.no_grad()
def gather(pieces: nn.Module, model: nn.Module) -> None:
    """Give `model` the weights of its copy in pieces, one after the other; all processes call it."""
    whole = model.state_dict()
    for name, value in pieces.state_dict().items():
        whole[name].copy_(full(value))


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def save(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
    """Every process writes its pieces (torch.distributed.checkpoint); any number of processes can read them."""
    dcp.save(_content(model, optimizer, ema), checkpoint_id=place)


def load(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
    content = _content(model, optimizer, ema)
    dcp.load(content, checkpoint_id=place)  # in place, but for numbers among the optimizer's state
    set_optimizer_state_dict(model, optimizer, content["optimizer"])


def _content(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Any]:
    content = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return content | ({"ema": ema.state_dict()} if ema else {})
