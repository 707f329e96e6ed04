"""Which samples a batch holds: the one shuffled order of everything, which follows from seed and batch number alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from t5lib.utils.seeds import numpy_generator

ORDER, SIZES = range(2)  # keep the random streams of one seed apart


@dataclass
class Sampler:
    """Full batches without end over samples of one or several sizes; a batch holds one size.

    The samples of one size come in a new order again and again, none a second time before all others. Of size s with n
    samples, epoch e has the batches ⌊e·n/B⌋ to ⌊(e+1)·n/B⌋, in an order of its own; what does not fill a batch is
    carried over.

    Attributes:
        counts: samples of each size.
        batch_size: B, of all processes together.
    """

    counts: Sequence[int]
    batch_size: int
    seed: int
    _orders: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)  # size → epoch → order of its samples

    def __call__(self, number: int) -> tuple[int, np.ndarray]:
        """Batch `number`: the number of its size, and which of the samples of that size it holds."""
        epoch = number * self.batch_size // sum(self.counts)
        while self._batches_before(epoch + 1).sum() <= number:
            epoch += 1
        before = self._batches_before(epoch)
        sizes = np.repeat(np.arange(len(self.counts)), self._batches_before(epoch + 1) - before)
        numpy_generator(self.seed, SIZES, epoch).shuffle(sizes)
        position = number - before.sum()
        size = int(sizes[position])
        first = int(before[size] + (sizes[:position] == size).sum()) * self.batch_size
        total = self.counts[size]
        return size, np.array([self._order(size, i // total)[i % total] for i in range(first, first + self.batch_size)])

    def _batches_before(self, epoch: int) -> np.ndarray:
        return epoch * np.array(self.counts) // self.batch_size

    def _order(self, size: int, epoch: int) -> np.ndarray:
        orders = self._orders.setdefault(size, {})
        if epoch not in orders:
            orders[epoch] = numpy_generator(self.seed, ORDER, size, epoch).permutation(self.counts[size])
            for old in [kept for kept in orders if abs(kept - epoch) > 1]:
                del orders[old]
        return orders[epoch]


def shuffled(count: int, strata: int, times: int, *key: int) -> Iterator[Tensor]:
    """`times` fresh random orders of `count` samples, as indices; they follow from `key`.

    At place i of every order is a sample whose number is i modulo `strata`: where their number divides `strata`,
    processes that hold every so many samples have equal shares of any part of an order.
    """
    generator, table = numpy_generator(*key), np.arange(count).reshape(-1, strata)
    for _ in range(times):
        yield torch.from_numpy(generator.permuted(table, axis=0).ravel())
