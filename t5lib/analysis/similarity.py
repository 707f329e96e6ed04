"""How alike two sets of activations are: relative error and linear CKA, summed up batch by batch in float64."""

import torch
from torch import Tensor


class RelativeError:
    """Squared error over the variance of what was wanted; 0: the same, 1: no better than its mean."""

    def __init__(self):
        self.squared_error = self.total = self.squares = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def add(self, found: Tensor, wanted: Tensor) -> None:
        found, wanted = found.double(), wanted.double()
        self.squared_error = self.squared_error + (found - wanted).square().sum()
        self.total, self.squares = self.total + wanted.sum(), self.squares + wanted.square().sum()
        self.count += wanted.numel()

    def value(self) -> float:
        variance = self.squares / self.count - (self.total / self.count) ** 2
        return (self.squared_error / self.count / variance).item()


class CKA:
    """Linear centred kernel alignment of two representations: 1 when they are alike up to rotation and scale, 0 when
    nothing linear is shared. Tokens are the examples, so n has to be well above the number of channels.

    Source: "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414), section 3, in its feature form:
    ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) with centred columns and Frobenius norms. Channels of very large variance decide it.
    """

    def __init__(self):
        nothing = torch.zeros((), dtype=torch.float64)
        self.count, self.sums, self.products = 0, [nothing] * 2, [nothing] * 3

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (n, C), y (n, C′): the same n tokens."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.sums = [total + part.sum(0) for total, part in zip(self.sums, (x, y), strict=True)]
        pairs = ((x, y), (x, x), (y, y))
        self.products = [total + a.T @ b for total, (a, b) in zip(self.products, pairs, strict=True)]

    def value(self) -> float:
        x, y = self.sums
        pairs = ((x, y), (x, x), (y, y))
        centred = [p - torch.outer(a, b) / self.count for p, (a, b) in zip(self.products, pairs, strict=True)]
        cross, own_x, own_y = (matrix.norm() for matrix in centred)
        return (cross.square() / (own_x * own_y)).item()
