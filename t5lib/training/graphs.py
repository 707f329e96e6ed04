"""Forward and backward passes as CUDA graphs, for trainings in which the card waits for Python to start its kernels.

A pass is recorded when an example of its shape comes for the first time, and started as a whole from then on. Making
examples, the optimizer, averaged weights and the log stay outside. A training learns the same with them:

- The passes before a recording, which compile kernels and choose algorithms, change no weight, and their gradients are
  dropped.
- A pass begins without gradients, so autograd writes new ones in every replay, to the same place in the graph's memory.
  There the optimizer reads them.
- Autocast narrows weights within a pass and forgets the copies at its end, so every replay narrows the weights of then.
- Graphs share their memory, and what one of them gave is used up before the next is replayed.

Source: "Whole-network capture" in PyTorch's notes on CUDA semantics.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from t5kernels.tools.graphs import recorded
from torch import Tensor, nn

from t5lib.utils.errors import T5Error, reason


def check(device: torch.device, num_processes: int) -> None:
    """Raises T5Error unless one process trains alone, on a CUDA device."""
    if device.type != "cuda":
        raise T5Error(f"graphs is on and the device is {device}; CUDA graphs need a CUDA device: leave graphs out")
    if num_processes > 1:
        raise T5Error(
            f"graphs is on and {num_processes} processes share the training; a graph holds no exchange between them: "
            "start one process (launch.processes: 1), or leave graphs out"
        )


class _Recording(NamedTuple):
    """A replay reads `tensors`, and gives a loss and a gradient, or None, for every parameter: the same memory every
    time."""

    tensors: dict[str, Tensor]
    replay: Callable[[], tuple[Tensor, list[Tensor | None]]]


class RecordedPasses:
    """The passes of one training; see the module.

    Args:
        model: whose parameters are trained, those that have a gradient now.
        tensors: all that a pass reads of an example, by name.
    """

    def __init__(self, model: nn.Module, tensors: Callable[[Any], dict[str, Tensor]]):
        self.tensors = tensors
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: dict[tuple, _Recording] = {}

    def __call__(self, learn: Callable[[Any], Tensor], example: Any) -> Tensor:
        """What `learn(example)` does, in place of the gradients that were there.

        Args:
            learn: a forward and a backward pass; returns the loss, detached. The same in every call.

        Returns:
            The loss. It and the gradients hold until the next call.

        Raises:
            T5Error: `learn` cannot be recorded.
        """
        current = self.tensors(example)
        layout = tuple((name, tensor.shape, tensor.dtype) for name, tensor in current.items())
        if layout not in self.recordings:
            self.recordings[layout] = self._recorded(learn, example)
        tensors, replay = self.recordings[layout]
        for name, tensor in current.items():
            tensors[name].copy_(tensor)
        loss, gradients = replay()
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _recorded(self, learn: Callable[[Any], Tensor], example: Any) -> _Recording:
        kept = copy.deepcopy(example)
        tensors = self.tensors(kept)

        def run() -> tuple[Tensor, list[Tensor | None]]:
            for parameter in self.trained:
                parameter.grad = None
            loss = learn(kept)
            return loss, [parameter.grad for parameter in self.trained]

        try:
            return _Recording(tensors, recorded(run, self.pool))
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise T5Error(
                f"training on {shapes} cannot be recorded as a CUDA graph ({reason(error)}); leave graphs out"
            ) from error
