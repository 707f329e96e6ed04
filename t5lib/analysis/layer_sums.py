"""What explanations of all families sum up, layer by layer, and how they run a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from t5lib.analysis.key_shift import shift_ratio
from t5lib.analysis.similarity import CKA, RelativeError
from t5lib.layers.attention import TTTLayer

SHIFTS = ("shift_softmax", "shift_before", "shift_after", "shift_fitted")


class LayerSums:
    """Of one layer over the images: errors, CKA, and shift ratios as means over heads times images."""

    def __init__(self):
        self.layer_error, self.block_error, self.cka = RelativeError(), RelativeError(), CKA()
        self.shifts: dict[str, float] = {}

    def add_shift(self, name: str, keys: Tensor) -> None:
        """keys (B, H, N, D)."""
        self.shifts[name] = self.shifts.get(name, 0.0) + shift_ratio(keys).mean().item() * len(keys)


def measured(layers: dict[str, LayerSums], count: int) -> dict[str, tuple[float | None, ...]]:
    """What was summed up over `count` images, by name, one entry a layer; None where a layer has no such shift."""
    result: dict[str, tuple[float | None, ...]] = {
        name: tuple(None if name not in layer.shifts else layer.shifts[name] / count for layer in layers.values())
        for name in SHIFTS
    }
    for name in ("layer_error", "block_error", "cka"):
        result[name] = tuple(getattr(layer, name).value() for layer in layers.values())
    return result


def kind_of(attention: nn.Module) -> str:
    """Such as "swiglu, dwc_qk"; "softmax" of a layer that was left."""
    if not isinstance(attention, TTTLayer):
        return "softmax"
    return f"{attention.mixer.config.inner}, {attention.mixer.config.locality}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
