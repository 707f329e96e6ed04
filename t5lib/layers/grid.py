"""Where the tokens of an image lie, and how a layer deep in a model learns it.

A model's forward sees the size of its input, but it calls its blocks without it. Checkpointing calls a block again,
from the thread of the backward pass, and threads share a model at different sizes: neither an attribute of the model
nor one of the thread is enough. So the list of blocks, when a forward iterates it, gives callables that hold the grid
of that forward (`carry_grid`); each makes it the grid of its thread for as long as its block runs (`current_grid`).
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.utils.errors import T5Error


@dataclass(frozen=True)
class TokenGrid:
    """A token layout: prefix tokens, the patches of a rows × columns grid, then suffix tokens.

    Attributes:
        rows, columns: of the grid.
        num_prefix_tokens: class and register tokens, before the grid's.
        num_suffix_tokens: text tokens, after the grid's. Like the prefix they have no place in the grid.
    """

    rows: int
    columns: int
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0

    @property
    def patches(self) -> slice:
        """Which tokens lie on the grid."""
        return slice(self.num_prefix_tokens, self.num_prefix_tokens + self.rows * self.columns)

    def with_suffix(self, num_suffix_tokens: int) -> "TokenGrid":
        """This layout with so many tokens after it."""
        return replace(self, num_suffix_tokens=num_suffix_tokens)

    def check(self, num_tokens: int) -> None:
        """Raises T5Error when `num_tokens` tokens cannot be this grid with its prefix and suffix."""
        held = self.rows * self.columns
        if num_tokens != held + self.num_prefix_tokens + self.num_suffix_tokens:
            suffix = f", {self.num_suffix_tokens} text tokens come after them" if self.num_suffix_tokens else ""
            raise T5Error(
                f"grid {self.rows}×{self.columns} holds {held} tokens and num_prefix_tokens is "
                f"{self.num_prefix_tokens}{suffix}, got {num_tokens} tokens; pass num_prefix_tokens for class and "
                "register tokens, and turn token dropping and merging off"
            )


class _Thread(threading.local):
    """The grids of one thread, each as an empty tensor (rows, columns, 0).

    A tensor, because torch.compile takes its sizes as inputs of what it compiles; numbers would become constants, and
    every new size another compilation.
    """

    def __init__(self) -> None:
        self.announced: Tensor | None = None  # of the forward that has begun and has not come to its blocks yet
        self.current: Tensor | None = None  # of the block that is running


_thread = _Thread()


def announce_grid(rows: int, columns: int) -> None:
    """Say the grid of the forward that this thread is in, before it iterates its blocks."""
    _thread.announced = torch.empty(rows, columns, 0)


def current_grid(num_prefix_tokens: int = 0) -> TokenGrid:
    """The grid of the block that this thread is running.

    Raises:
        T5Error: no block of a converted model is running.
    """
    if _thread.current is None:
        raise T5Error(
            "a converted layer was called outside of its model's blocks, where nothing tells the grid of its tokens; "
            "call the model, or pass grid=TokenGrid(rows, columns, num_prefix_tokens) to the layer. A wrapper around "
            "single blocks that calls them again in the backward pass has to wrap what iterating the blocks gives"
        )
    rows, columns, _ = _thread.current.shape
    return TokenGrid(rows, columns, num_prefix_tokens)


@contextmanager
def grid_scope(grid: TokenGrid) -> Iterator[None]:
    """Within, layers that this thread calls by themselves have the tokens of `grid`."""
    before, _thread.current = _thread.current, torch.empty(grid.rows, grid.columns, 0)
    try:
        yield
    finally:
        _thread.current = before


class BlockOnGrid:
    """A block together with the grid of one forward; called like the block, with its attributes."""

    def __init__(self, block: nn.Module, grid: Tensor):
        self.block, self.grid = block, grid

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, _thread.current = _thread.current, self.grid
        try:
            return self.block(*args, **kwargs)
        finally:
            _thread.current = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _on_announced_grid(blocks: Iterable[nn.Module]) -> Iterator[Any]:
    """The blocks, each on the grid of the forward that iterates them; as they are outside of a forward."""
    grid, _thread.announced = _thread.announced, None
    return iter([block if grid is None else BlockOnGrid(block, grid) for block in blocks])


class GridSequential(nn.Sequential):
    """An nn.Sequential of blocks that carries the grid (`carry_grid`)."""

    def __iter__(self) -> Iterator[Any]:
        return _on_announced_grid(self._modules.values())

    def children(self) -> Iterator[Any]:  # what timm's checkpoint_seq iterates
        return _on_announced_grid(self._modules.values())


class GridModuleList(nn.ModuleList):
    """An nn.ModuleList of blocks that carries the grid (`carry_grid`)."""

    def __iter__(self) -> Iterator[Any]:
        return _on_announced_grid(self._modules.values())


_CARRYING: dict[type, type] = {nn.Sequential: GridSequential, nn.ModuleList: GridModuleList}


def carry_grid(blocks: nn.Module) -> None:
    """Make a container of blocks, in place, hand on the grid of every forward that iterates it.

    Raises:
        T5Error: it is of another kind than nn.Sequential and nn.ModuleList.
    """
    if type(blocks) not in (*_CARRYING, *_CARRYING.values()):
        expected = " or ".join(kind.__name__ for kind in _CARRYING)
        raise T5Error(f"the model's blocks are a {type(blocks).__name__}; expected {expected}")
    blocks.__class__ = _CARRYING.get(type(blocks), type(blocks))


def drop_grid(blocks: nn.Module) -> None:
    """Undo `carry_grid`."""
    kinds = {carrying: plain for plain, carrying in _CARRYING.items()}
    blocks.__class__ = kinds.get(type(blocks), type(blocks))
