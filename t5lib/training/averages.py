"""Averaged weights: what a training gives, and what a denoiser may learn from."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class AveragedWeights(nn.Module):
    """A copy of a model, `module`, whose weights and buffers are running averages of those of the model in training.

    The decay begins at 0 and rises with the step, 1 - step^(-2/3), up to `decay`. So the averages do not hang on to the
    first weights; this is the warm-up that timm's ModelEmaV3 has from Katherine Crowson.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay = decay
        self.pairs: list[tuple[Tensor, Tensor]] = []  # collecting them takes tens of milliseconds

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step number `step`, from 1. `model` is the same in every call."""
        if not self.pairs:
            self.pairs = list(zip(*(each.state_dict().values() for each in (self.module, model)), strict=True))
        weight = 1 - min(self.decay, 1 - step ** (-2 / 3))
        averaged = [pair for pair in self.pairs if pair[0].is_floating_point()]
        for ours, theirs in self.pairs:
            if not ours.is_floating_point():
                ours.copy_(theirs)
        if any(isinstance(ours, DTensor) for ours, _ in averaged):  # in pieces, for which there is no joint operation
            for ours, theirs in averaged:
                ours.lerp_(theirs, weight)
        else:
            torch._foreach_lerp_([ours for ours, _ in averaged], [theirs for _, theirs in averaged], weight)
