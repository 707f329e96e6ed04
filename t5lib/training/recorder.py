"""What a model's blocks give in a forward pass, and how far one model's tokens and output are from another's.

Shapes: B images, N image tokens, C channels.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from t5lib.families import family_of
from t5lib.families.base import Adapter
from t5lib.families.inputs import Inputs
from t5lib.layers.grid import TokenGrid
from t5lib.utils import processes
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating
from t5lib.utils.processes import WHOLE, Part


class Recorder:
    """Keeps what a model's blocks, and the part `features`, give while `recording`.

    Args:
        family: of the model.
        model: whose forwards are recorded.
        features: a part's name, or None.
        damping: of the gradient between blocks, see AlignConfig.

    Attributes:
        blocks: image tokens (B, N, C) of every block, prefix tokens first, of the last forward recorded.
        features: what the part gave, likewise.
        before: how many blocks had run when it did.
    """

    def __init__(self, family: Adapter, model: nn.Module, features: str | None, damping: float = 0.0):
        self.family, self.damping = family, damping
        self.on: int | None = None  # the thread whose forward is recorded
        self.forget()
        self.undo: list[Callable[[], None]] = []
        *others, last = family.blocks(model)
        for block in others:
            self._watch(block, self._keep_and_damp)
        self._watch(last, self._keep_block)
        if features:
            self._watch(model.get_submodule(features), self._keep_features)

    def forget(self) -> None:
        """Let go of what was recorded."""
        self.blocks: list[Tensor] = []
        self.features: Any = None
        self.before = 0

    def _watch(self, module: nn.Module, keep: Callable[[Any], Any]) -> None:
        """What `keep` returns takes the place of the output. Outside of what is compiled: a hook would become a part
        of it."""
        compiled = module._compiled_call_impl
        if compiled is None:
            self.undo.append(module.register_forward_hook(lambda _module, _inputs, output: keep(output)).remove)
            return
        module._compiled_call_impl = lambda *args, **kwargs: keep(compiled(*args, **kwargs))
        # gone when the trainer undoes its compilation

    def _keep_block(self, output: Any) -> Any:
        if self.on == threading.get_ident():
            self.blocks.append(self.family.block_tokens(output))
        return output

    def _keep_and_damp(self, output: Any) -> Any:
        self._keep_block(output)
        return (
            tree_map_only(Tensor, self._damped, output) if self.damping and self.on == threading.get_ident() else output
        )

    def _damped(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        passed_on = tensor.view_as(tensor)  # of its own: the recorded one's gradient stays whole
        passed_on.register_hook(lambda gradient: gradient * (1 - self.damping))
        return passed_on

    def _keep_features(self, output: Any) -> Any:
        if self.on == threading.get_ident():
            self.features, self.before = self.family.block_tokens(output), len(self.blocks)
        return output

    def check_features(self, name: str, grid: TokenGrid) -> None:
        """Raises T5Error unless the part called `name` gave, after a block, the tokens of all blocks' kind."""
        tokens, gave = self.blocks[-1].shape[1], self.features
        if isinstance(gave, Tensor) and gave.ndim == 3 and gave.shape[1] == tokens and self.before:
            return
        shape = f"gives {tuple(gave.shape)}" if isinstance(gave, Tensor) else "gives no tensor"
        problem = "is not called in a forward" if gave is None else shape
        if self.before == 0 and gave is not None:
            problem = "comes before the first block, where both models are the same"
        raise T5Error(
            f"align: features '{name}' {problem}; expected a part that gives tokens (B, {tokens}, C) of the grid of "
            f"{grid.rows}×{grid.columns}: a block, or the norm after the last ('norm' in timm's models), or null"
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around one forward; blocks that checkpointing calls again in the backward pass are not recorded."""
        self.forget()
        self.on = threading.get_ident()
        try:
            yield
        finally:
            self.on = None

    def remove(self) -> None:
        for undo in self.undo:
            undo()
        self.undo = []


def check_features(model: nn.Module, name: str, inputs: Inputs) -> None:
    """Raises T5Error unless the part `name` of a softmax model, on any device, gives what AlignConfig.features needs.

    Args:
        inputs: what the model is called with, of any numbers.
    """
    family = family_of(model)
    recorder = Recorder(family, model, name)
    try:
        with torch.no_grad(), evaluating(model), recorder.recording():
            family.call(model, inputs)
        recorder.check_features(name, family.grid(model, inputs))
    finally:
        recorder.remove()


def token_variance(theirs: Tensor, grid: TokenGrid, part: Part) -> Tensor:
    """Variance of the teacher's image tokens (B, N, C) over images and tokens; the mean over channels, in float32.

    What all tokens have in common does not count.

    Args:
        part: of the images that it is of, that are here.
    """
    return processes.variance(theirs.float()[:, grid.patches], (0, 1), part).mean()


def token_errors(
    ours: Tensor, theirs: Tensor, grid: TokenGrid, cosine: bool = False, variance: Tensor | None = None
) -> dict[str, Tensor]:
    """Squared error of tokens (B, N, C) over the variance of the teacher's image tokens, scalars in float32.

    Args:
        variance: where it is of more images than these (`token_variance`).

    Returns:
        "image"; "prefix" where there are prefix tokens; "cosine", 1 minus the mean cosine of image tokens, if asked.
    """
    ours, theirs, patches = ours.float(), theirs.float(), grid.patches
    image, wanted = ours[:, patches], theirs[:, patches]
    scale = token_variance(theirs, grid, WHOLE) if variance is None else variance
    errors = {"image": (image - wanted).square().mean() / scale}
    if patches.start:
        errors["prefix"] = (ours[:, : patches.start] - theirs[:, : patches.start]).square().mean() / scale
    if cosine:
        errors["cosine"] = 1 - F.cosine_similarity(image, wanted, dim=-1).mean()
    return errors


def output_error(output: Tensor, wanted: Tensor, part: Part = WHOLE) -> Tensor:
    """Squared error over the variance of all that the teacher's output holds, a scalar in float32.

    Args:
        part: of the images that the variance is of, that are here.
    """
    output, wanted = output.float(), wanted.float()
    variance = processes.variance(wanted, tuple(range(wanted.ndim)), part)
    return (output - wanted).square().mean() / variance
