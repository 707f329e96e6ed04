"""Where the tokens of an image lie, and how a layer deep in a model learns it.

A model's forward sees the size of its input, but it calls its blocks without it. Checkpointing calls a block again,
from the thread of the backward pass, and threads share a model at different sizes: neither an attribute of the model
nor one of the thread is enough. So a forward is a pass (`one_pass`), which its embedding tells the grid (`tell_grid`).
The list of blocks, when it is iterated within the pass, gives callables that hold this grid (`carry_grid`), and each
makes it the grid of its thread for as long as its block runs (`current_grid`). Outside of a pass nobody has a grid.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

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

    def on_grid(self, x: Tensor) -> Tensor:
        """Those tokens of (B, H, N, D) that lie on the grid: x[:, :, patches].

        torch.compile of torch 2.11 would take the ends of that slice for constants.
        """
        return x.narrow(2, self.num_prefix_tokens, self.rows * self.columns)

    def with_suffix(self, num_suffix_tokens: int) -> "TokenGrid":
        """This layout with suffix tokens after it."""
        return replace(self, num_suffix_tokens=num_suffix_tokens)

    @property
    def whole(self) -> "TokenGrid":
        """The grid of the whole image, of which a process may have only some rows."""
        return self

    def with_neighbors(
        self, compute: Callable[..., Any], *tokens: Tensor, window: int, moves_inward: bool = False
    ) -> Any:
        """`compute(*tokens, grid)`, where a token's result depends on tokens within a window of rows around its own.

        Args:
            tokens: (B, H, N, D) each, all tokens of this grid. `compute` gives one such tensor, or several.
            window: rows, an odd number.
            moves_inward: whether the window moves inward at the image's border; otherwise it is cut off there.
        """
        return compute(*tokens, self)

    def gathered(self, *tokens: Tensor) -> list[Tensor]:
        """These tokens (B, H, N, D) of the whole image."""
        return list(tokens)

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


class _Pass:
    """A forward of one model, on a grid that is known once its embedding has been called."""

    def __init__(self, embedding: nn.Module, blocks: list[nn.Module]):
        self.embedding, self.blocks = embedding, blocks
        self.grid: Tensor | None = None

    def holds(self, blocks: nn.Module) -> bool:
        """Whether `blocks` are a list of the model's, or the first of one (a slice)."""
        first = next(iter(blocks._modules.values()), None)
        return any(next(iter(own._modules.values()), None) is first for own in self.blocks)


class _Thread(threading.local):
    """What one thread is doing, with grids as empty tensors (rows, columns, 0).

    Tensors, because torch.compile takes their sizes as inputs of what it compiles; numbers would become constants, and
    every new size another compilation.
    """

    def __init__(self) -> None:
        self.running: _Pass | None = None
        self.current: Tensor | None = None  # the grid of the block that is running


_thread = _Thread()


def one_pass(method: Callable[..., Any], embedding: str, *blocks: str) -> Callable[..., Any]:
    """`method` of a model, each call a pass of that model alone.

    Args:
        embedding, blocks: names of the part that is called with the images, and of the containers of blocks, with dots
            where they lie deeper.
    """

    @functools.wraps(method)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = _Pass(model.get_submodule(embedding), [model.get_submodule(name) for name in blocks])
        before, _thread.running = _thread.running, own
        try:
            return method(model, *args, **kwargs)
        finally:
            _thread.running = before

    return run


def tell_grid(embedding: nn.Module, rows: int, columns: int) -> None:
    """Say which grid `embedding` made; it is that of the pass that this thread is in, if the embedding is its own.

    Raises:
        T5Error: the images are stand-ins of torch.fx, which have no size.
    """
    if isinstance(rows, fx.Proxy):
        raise T5Error("torch.fx traces without sizes, and a TTT layer needs its grid's size; use torch.export")
    if _thread.running is not None and _thread.running.embedding is embedding:
        _thread.running.grid = torch.empty(rows, columns, 0)


def told_grid() -> TokenGrid:
    """The grid of the image in this thread's running forward, as its embedding was called with it.

    Raises:
        T5Error: no forward of a converted model runs, or nothing has told its grid yet.
    """
    if _thread.running is None or _thread.running.grid is None:
        raise T5Error("no forward of a converted model is running in this thread; call the model as a whole")
    rows, columns, _ = _thread.running.grid.shape
    return TokenGrid(rows, columns)


def current_grid(num_prefix_tokens: int = 0) -> TokenGrid:
    """The grid of the block that this thread is running.

    Raises:
        T5Error: no block of a converted model is running.
    """
    if _thread.current is None:
        raise T5Error(
            "a converted layer was called outside a forward of its model, where nothing gives the grid of its "
            "tokens; call the model, or pass grid=TokenGrid(rows, columns, num_prefix_tokens) to the layer, or call "
            "blocks within t5lib.layers.grid.grid_scope(TokenGrid(…)). A list that takes the place of the model's own "
            "blocks does not carry the grid: change that in place. A wrapper around single blocks that calls them "
            "again in the backward pass has to wrap what iterating over the blocks gives"
        )
    rows, columns, _ = _thread.current.shape
    return TokenGrid(rows, columns, num_prefix_tokens, 0)  # in full: torch.compile would look up a default every time


@contextmanager
def grid_scope(grid: TokenGrid) -> Iterator[None]:
    """Within, layers and blocks that this thread calls by themselves have the tokens of `grid`."""
    before, _thread.current = _thread.current, torch.empty(grid.rows, grid.columns, 0)
    try:
        yield
    finally:
        _thread.current = before


class BlockOnGrid:
    """A block together with the grid of one forward; called like the block, with its attributes."""

    def __init__(self, block: Callable[..., Any], grid: Tensor | None):
        self.block, self.grid = block, grid

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, _thread.current = _thread.current, self.grid
        try:
            return self.block(*args, **kwargs)
        finally:
            _thread.current = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def on_current_grid(call: Callable[..., Any]) -> BlockOnGrid:
    """`call` on the grid of the block that this thread is running, whenever and in whichever thread it is called."""
    return BlockOnGrid(call, _thread.current)


def _on_grid(blocks: nn.Module) -> Iterator[Any]:
    """The blocks, each on the grid of the pass that iterates them; as they are outside of a pass of their model."""
    running = _thread.running
    grid = running.grid if running is not None and running.holds(blocks) else None
    return iter([block if grid is None else BlockOnGrid(block, grid) for block in blocks._modules.values()])


class GridSequential(nn.Sequential):
    """An nn.Sequential of blocks that carries the grid (`carry_grid`)."""

    def __iter__(self) -> Iterator[Any]:
        return _on_grid(self)

    def children(self) -> Iterator[Any]:  # what timm's checkpoint_seq iterates
        return _on_grid(self)


class GridModuleList(nn.ModuleList):
    """An nn.ModuleList of blocks that carries the grid (`carry_grid`)."""

    def __iter__(self) -> Iterator[Any]:
        return _on_grid(self)


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
