"""The processes that do one piece of work together, as `accelerate launch`, torchrun or SLURM started them.

What they do depends on seeds and on the numbers of samples, and on no process: whatever their number, the result is the
same. A Part says which of the samples a process takes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from t5lib.utils.errors import T5Error

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor

STRATEGY = "T5_STRATEGY"  # the variable with which a training is told to hold a model in pieces: "fsdp2"
Value = TypeVar("Value")
# How long a process waits for another that works alone. What ends them all when one has died is their launcher.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Part:
    """What a process takes of a stream of batches that is the same for all of them.

    Attributes:
        turn, turns: of every so many (`turns`) batches the one with this number (`turn`), from 0.
        row, rows: of every so many (`rows`) samples in a batch, likewise.
    """

    turn: int = 0
    turns: int = 1
    row: int = 0
    rows: int = 1

    def numbers(self, start: int) -> Iterator[int]:
        """The numbers of its batches, from `start` on, without end."""
        return count(start + self.turn, self.turns)

    def of(self, samples: int, what: str = "a batch") -> slice:
        """Which of `samples` samples this process takes. Raises T5Error unless every process gets as many."""
        if samples % self.rows:
            raise T5Error(
                f"{what} holds {samples} samples, which {self.rows} processes cannot share evenly; expected a multiple "
                f"of {self.rows}, such as {-(-samples // self.rows) * self.rows}, or start fewer processes"
            )
        return slice(self.row, None, self.rows)


WHOLE = Part()


def leads() -> bool:
    """Whether this is the first of them, which alone writes, shows progress and tells MLflow. Imports nothing."""
    return int(os.environ.get("RANK", 0)) == 0


def alone() -> bool:
    """Whether there is but one. Imports nothing."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def state() -> "PartialState":
    """Number and place of this process among those that work together, and its device, as Accelerate has them.

    Without an accelerator they meet on the CPU (gloo); left to itself, Accelerate would let each work alone there.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def rows() -> Part:
    """This process's part where all share every batch."""
    return Part(row=state().process_index, rows=state().num_processes)


def turns() -> Part:
    """This process's part where they take batches in turn."""
    return Part(turn=state().process_index, turns=state().num_processes)


def all_know(value: Any) -> Any:
    """The value of the first process, in every one of them."""
    if alone():
        return value
    from accelerate.utils import broadcast_object_list

    state()
    return broadcast_object_list([value])[0]


def by_first(work: Callable[[], Value]) -> Value:
    """What `work` gives, done by the first of them while the others wait."""
    if alone():
        return work()
    return all_know(work() if leads() else None)


def wait() -> None:
    """Wait until all processes are here."""
    if not alone():
        state().wait_for_everyone()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order, in every one of them."""
    if alone():
        return [value]
    from accelerate.utils import gather_object

    state()
    return gather_object([value])


def in_order(part: "Tensor") -> "Tensor":
    """All rows, which the processes hold in turn, gathered in every process on its own device."""
    parts = gathered(part.cpu())
    whole = part.new_empty(sum(map(len, parts)), *part.shape[1:])
    for place, rows in enumerate(parts):
        whole[place :: len(parts)] = rows.to(part.device)
    return whole


def any_of(holds: bool) -> bool:
    """Whether it holds in any of them."""
    import torch
    from torch import distributed

    if alone():
        return holds
    flag = torch.tensor(float(holds), device=state().device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def average(tensors: Sequence["Tensor"]) -> None:
    """Let each tensor be its mean over the processes, in place. All have the same ones, of one dtype, in one order."""
    import torch
    from torch import distributed

    if alone() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= state().num_processes
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def alike(tensors: Sequence["Tensor"]) -> None:
    """Let each tensor be that of the first process, in place."""
    from torch import distributed

    if not alone():
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), 0)


def variance(tensor: "Tensor", dim: tuple[int, ...], part: Part) -> "Tensor":
    """Over these dimensions of a tensor whose rows several processes share; without a gradient.

    Means and mean squared deviations of the processes are merged: sums of squares would lose the digits.
    """
    import torch
    from torch import distributed

    with torch.no_grad():
        spread, mean = torch.var_mean(tensor, dim=dim, correction=0)
        if part.rows == 1:
            return spread
        both = [torch.empty_like(torch.stack([spread, mean])) for _ in range(part.rows)]
        distributed.all_gather(both, torch.stack([spread, mean]))
        spreads, means = torch.stack(both, dim=1)
        return spreads.mean(0) + means.var(0, correction=0)
