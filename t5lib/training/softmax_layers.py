"""Which attentions of a converted model had better be softmax again: those whose conversion harms the whole model most.

It is measured after calibration, when every new layer is as good as it gets by itself: the harm of a layer is what the
model's error loses when the softmax model's own attention takes its place. Layers add to each other's errors, so they
are put back one by one, and each round measures all that are left in the company of those that were put back before.

Docs: docs/choosing.md. Fixed rules beside it: docs/results.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from t5lib.conversion import ttt_layers
from t5lib.families import family_of
from t5lib.families.base import Adapter
from t5lib.families.inputs import Inputs
from t5lib.families.replacement import without_layers
from t5lib.training.recorder import Recorder, output_error, token_errors
from t5lib.utils.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class SoftmaxChoice:
    """What was put back, and what everything else would have brought.

    Attributes:
        layers: names of the attentions that are softmax again, in the order in which they were chosen.
        error: of the model with all layers converted: squared error of its features and its output over their variance.
        error_with: for each round and each layer that was tried in it, the error of the model when that layer is
            softmax too.
    """

    layers: tuple[str, ...]
    error: float
    error_with: tuple[dict[str, float], ...]


@torch.no_grad()
def put_softmax_back(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Inputs],
    count: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> SoftmaxChoice:
    """Give `count` attentions of `model` back to softmax, in place, as they are in `teacher`.

    Args:
        model: converted and calibrated.
        teacher: the softmax model.
        batches: what both are called with; the error is their mean.
        autocast: what forward passes run in.
    """
    family, chosen, rounds = family_of(model), [], []
    with evaluating(model, teacher):
        measure = _Measure(family, teacher, batches, autocast)
        error = measure(model)
        for _ in range(count):
            errors = {}
            for name in ttt_layers(model):
                with _softmax_at(model, teacher, name):
                    errors[name] = measure(model)
            best = min(errors, key=lambda name: errors[name])
            chosen.append(best)
            rounds.append(errors)
            model.set_submodule(best, copy.deepcopy(teacher.get_submodule(best)))
    _settle(family, model, chosen)
    return SoftmaxChoice(layers=tuple(chosen), error=error, error_with=tuple(rounds))


@contextmanager
def _softmax_at(model: nn.Module, teacher: nn.Module, name: str) -> Iterator[None]:
    layer = model.get_submodule(name)
    model.set_submodule(name, teacher.get_submodule(name))
    try:
        yield
    finally:
        model.set_submodule(name, layer)


def _settle(family: Adapter, model: nn.Module, chosen: list[str]) -> None:
    """Let the model's settings and its account say which layers are converted."""
    names = family.attention_names(model)
    layers = tuple(index for index, name in enumerate(names) if name in ttt_layers(model))
    family.mark(model, dataclasses.replace(model.t5_config, layers=layers, softmax_layers=0))
    before, model.t5_report = model.t5_report, without_layers(family, model.t5_report, model, chosen)
    for name in set(before.dropped) - set(model.t5_report.dropped):
        model.get_parameter(name).requires_grad_(True)


class _Measure:
    """The error of a model against the teacher's features and output, which are computed once."""

    def __init__(
        self,
        family: Adapter,
        teacher: nn.Module,
        batches: Sequence[Inputs],
        autocast: Callable[[], AbstractContextManager],
    ):
        self.family, self.batches, self.autocast = family, batches, autocast
        self.wanted = [self._run(teacher, inputs) for inputs in batches]

    def _run(self, model: nn.Module, inputs: Inputs) -> tuple[torch.Tensor | None, torch.Tensor]:
        recorder = Recorder(self.family, model, self.family.features)
        try:
            with recorder.recording(), self.autocast():
                output = self.family.call(model, inputs)
        finally:
            recorder.remove()
        return recorder.features, output

    def __call__(self, model: nn.Module) -> float:
        total = 0.0
        for inputs, (their_features, wanted) in zip(self.batches, self.wanted, strict=True):
            features, output = self._run(model, inputs)
            error = output_error(output, wanted)
            if features is not None and their_features is not None:
                error = error + token_errors(features, their_features, self.family.grid(model, inputs))["image"]
            total += error.item()
        return total / len(self.batches)
