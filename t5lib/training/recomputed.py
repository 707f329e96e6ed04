"""Blocks that recompute their activations in the backward pass instead of keeping them: a share of them, or as many as
the memory of a card makes necessary."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from t5lib.families import family_of
from t5lib.layers.grid import on_current_grid
from t5lib.utils import processes

AUTO = "auto"
SPARE = 0.1  # of the memory: for what fragments it, and for images larger than those of the first step
GIB = 2**30


class Memory(Protocol):
    """Of a device, in bytes."""

    def usable(self) -> int:
        """What this process may take in all."""

    def allocated(self) -> int:
        """What its tensors take now."""

    def forget_peak(self) -> None: ...

    def peak(self) -> int:
        """The most that its tensors have taken since `forget_peak`."""


class CardMemory:
    """That of a CUDA device; see Memory."""

    def __init__(self, device: torch.device):
        # The limit of a process is told for a numbered card alone, "cuda" is not enough.
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def usable(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * total
        return min(free + torch.cuda.memory_reserved(self.device), int(allowed))

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


def memory_of(device: torch.device) -> Memory | None:
    """The memory that AUTO looks at; None for a device that tells nothing of it."""
    return CardMemory(device) if device.type == "cuda" else None


class _Block:
    """A block's call, recomputed in the backward pass if `again`.

    Attributes:
        activations: bytes that its activations took when they were recomputed; measured where there is `memory`.
    """

    def __init__(self, call: Callable[..., Any], memory: Memory | None):
        self.call, self.memory = call, memory
        self.again, self.activations = True, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.again:
            return self.call(*args, **kwargs)
        return checkpoint(self._measured(on_current_grid(self.call)), *args, use_reentrant=False, **kwargs)

    def _measured(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose second run is the one of the backward pass, and ends early, by an exception."""
        if (memory := self.memory) is None:
            return call
        runs = itertools.count()

        def run(*args: Any, **kwargs: Any) -> Any:
            if not next(runs):
                return call(*args, **kwargs)
            before = memory.allocated()
            try:
                return call(*args, **kwargs)
            finally:
                self.activations = max(self.activations, memory.allocated() - before)

        return run


class Recomputation:
    """The blocks of a model that recompute, in order.

    With AUTO these are all of them in the first step, whose passes run within `observed`. Then `choose` lets as many as
    possible keep their activations.
    """

    def __init__(self, blocks: list[_Block], memory: Memory | None):
        self.blocks = blocks
        self.memory = memory  # None where nothing is to be chosen, or no more
        self.taken = 0

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Around the forward and backward passes of a step."""
        if self.memory is None:
            yield
            return
        self.memory.forget_peak()
        before = self.memory.allocated()
        yield
        self.taken = self.memory.peak() - before

    def choose(self) -> None:
        """After a step, when the optimizer's state is there and gradients are not.

        Passes will need what they took in the first step, which recomputed all blocks, and the activations that are
        kept. Where processes share the work, all keep as many as the one with the least room.
        """
        if self.memory is None:
            return
        room = int((1 - SPARE) * self.memory.usable()) - self.memory.allocated() - self.taken
        sums = list(itertools.accumulate(block.activations for block in reversed(self.blocks)))
        kept = min(processes.gathered(sum(total <= room for total in sums)))
        again = len(self.blocks) - kept
        for block in self.blocks[again:]:
            block.again = False
        for block in self.blocks:
            block.memory = None
        self.memory = None
        torch.cuda.empty_cache()  # what the first step left is cut to other sizes
        if processes.leads():
            print(
                f"gradient_checkpointing auto: {again} of {len(sums)} blocks recompute their activations; those of all "
                f"take {sums[-1] / GIB:.1f} GiB, and there is room for {max(room, 0) / GIB:.1f}",
                flush=True,
            )


@contextmanager
def recomputed_blocks(model: nn.Module, share: float | str, memory: Memory | None = None) -> Iterator[Recomputation]:
    """Within this context, `share` of the model's blocks (rounded up) do so; compiled blocks rerun their compiled code.

    They are the first blocks: when the backward pass reaches them, the memory of the others is free again.

    Args:
        share: from 0 to 1, or AUTO: what fits into `memory`, and none of them where there is none.
    """
    memory = memory if share == AUTO else None
    part = float(memory is not None) if share == AUTO else float(share)
    blocks = list(family_of(model).blocks(model))
    chosen = blocks[: math.ceil(part * len(blocks))]
    before = [block._compiled_call_impl for block in chosen]
    calls = [_Block(compiled or block._call_impl, memory) for block, compiled in zip(chosen, before, strict=True)]
    for block, call in zip(chosen, calls, strict=True):
        block._compiled_call_impl = call
    try:
        yield Recomputation(calls, memory)
    finally:
        for block, compiled in zip(chosen, before, strict=True):
            block._compiled_call_impl = compiled
