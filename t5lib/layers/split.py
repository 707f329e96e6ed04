"""One image in several processes: each has some rows of its tokens, and fetches from the others what these depend on.

Every process calls the same layers in the same order, so it knows which rows each of them has and needs, and nothing is
negotiated. Nothing here has gradients.

Shapes: B images, H heads, N tokens, D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from t5kernels import KeyStatistics
from torch import Tensor, distributed

from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

Interval = tuple[int, int]  # the first, and the one after the last


@dataclass(frozen=True)
class Split:
    """How the processes of a group share things, such as the rows of an image: in order, and as evenly as possible.

    Attributes:
        group: as torch.distributed has it.
        rank, size: the number of this process in the group, and how many there are.
    """

    group: distributed.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: distributed.ProcessGroup) -> "Split":
        return cls(group, distributed.get_rank(group), distributed.get_world_size(group))

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Split":
        """Itself: a copy of a model belongs to the same processes."""
        return self

    def share_of(self, rank: int, total: int) -> Interval:
        """The share of a process in `total` things; if they do not divide evenly, the first processes have one more."""
        each, more = total // self.size, total % self.size
        first = rank * each + min(rank, more)
        return first, first + each + (rank < more)

    def part(self, grid: TokenGrid) -> "RowsOfGrid":
        """This process's rows of `grid`, the grid of the whole image.

        Raises:
            T5Error: the image has fewer rows than there are processes.
        """
        if grid.rows < self.size:
            raise T5Error(
                f"an image of {grid.rows}×{grid.columns} tokens cannot be shared by {self.size} processes, because "
                "each needs at least one row; draw larger images, or start fewer processes"
            )
        first, end = self.share_of(self.rank, grid.rows)
        return RowsOfGrid(end - first, grid.columns, split=self, first=first, total=grid.rows)


@dataclass(frozen=True, kw_only=True)
class RowsOfGrid(TokenGrid):
    """The rows of an image that a process has. Its own are a TokenGrid; there are no class or register tokens.

    Attributes:
        split: the processes that share the image.
        first: the position in the image of the first of these rows.
        total: rows of the whole image.
    """

    split: Split
    first: int
    total: int

    @property
    def whole(self) -> TokenGrid:
        return TokenGrid(self.total, self.columns)

    @property
    def tokens(self) -> slice:
        """Which tokens of the image are this process's."""
        return slice(self.first * self.columns, (self.first + self.rows) * self.columns)

    def with_neighbors(
        self, compute: Callable[..., Any], *tokens: Tensor, window: int, moves_inward: bool = False
    ) -> Any:
        """See TokenGrid; `compute` runs on these rows and those that they need, and the result for these is kept."""
        needs = [self._near(rank, window, moves_inward) for rank in range(self.split.size)]
        start, end = needs[self.split.rank]
        results = compute(*self._fetched(tokens, needs), TokenGrid(end - start, self.columns))
        own = slice((self.first - start) * self.columns, (self.first - start + self.rows) * self.columns)
        return results[:, :, own] if isinstance(results, Tensor) else tuple(each[:, :, own] for each in results)

    def gathered(self, *tokens: Tensor) -> list[Tensor]:
        """See TokenGrid; the tokens of the other processes are fetched."""
        return self._fetched(tokens, [(0, self.total)] * self.split.size)

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        distributed.all_reduce(x, group=self.split.group)
        return x

    def statistics(self, k: Tensor) -> KeyStatistics:
        """The statistics of the keys of the whole image; `k` (B, H, N, D) are this process's keys."""
        size, own = self.split.size, KeyStatistics.of(k)
        mine = torch.stack([own.mean, own.squares])
        every = mine.new_empty(size * 2, *own.mean.shape)
        distributed.all_gather_into_tensor(every, mine, group=self.split.group)
        rows = [self.split.share_of(rank, self.total) for rank in range(size)]
        counts = [(end - first) * self.columns for first, end in rows]
        return KeyStatistics.merged(
            [KeyStatistics(count, *both) for count, both in zip(counts, every.unflatten(0, (size, 2)), strict=True)]
        )

    def _near(self, rank: int, window: int, moves_inward: bool) -> Interval:
        """The rows that the rows of a process depend on."""
        (first, end), reach = self.split.share_of(rank, self.total), window // 2
        if not moves_inward:
            return max(first - reach, 0), min(end + reach, self.total)
        last = self.total - window  # the first row of the last window
        return min(max(first - reach, 0), last), min(max(end - 1 - reach, 0), last) + window

    def _fetched(self, tokens: Sequence[Tensor], needs: list[Interval]) -> list[Tensor]:
        """The rows of each of the tokens (B, H, N, D) that this process needs, including its own.

        Args:
            needs: the rows that every process needs, by rank.
        """
        split, mine = self.split, (self.first, self.first + self.rows)
        every = range(split.size)
        sent = [_common(mine, needs[rank]) if rank != split.rank else (0, 0) for rank in every]
        received = [_common(split.share_of(rank, self.total), needs[split.rank]) for rank in every]
        rows = [end - start if rank != split.rank else 0 for rank, (start, end) in enumerate(received)]
        outgoing = torch.stack([self._rows(t, sent) for t in tokens], dim=1)
        incoming = outgoing.new_empty(sum(rows), *outgoing.shape[1:])
        distributed.all_to_all_single(incoming, outgoing, rows, [end - start for start, end in sent], group=split.group)
        before, after = incoming.tensor_split((sum(rows[: split.rank]),))
        return [_joined(before[:, i], t, after[:, i]) for i, t in enumerate(tokens)]

    def _rows(self, tokens: Tensor, intervals: Sequence[Interval]) -> Tensor:
        """The tokens of intervals of rows of the image, all of them this process's: (rows, B, columns, H, D)."""
        by_row = tokens.transpose(1, 2).unflatten(1, (self.rows, self.columns)).transpose(0, 1)
        return torch.cat([by_row[max(start - self.first, 0) :][: end - start] for start, end in intervals])


def _common(a: Interval, b: Interval) -> Interval:
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def _joined(before: Tensor, tokens: Tensor, after: Tensor) -> Tensor:
    """Tokens (B, H, N, D) with rows (rows, B, columns, H, D) before and after them; in memory (B, N, H, D)."""
    before, after = (rows.transpose(0, 1).flatten(1, 2).to(tokens.dtype) for rows in (before, after))
    return torch.cat([before, tokens.transpose(1, 2), after], dim=1).transpose(1, 2)
