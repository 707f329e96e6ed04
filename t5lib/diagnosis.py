"""What a softmax model's keys look like: the shift that all keys of a head share, layer by layer."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.errors import T5Error
from t5lib.families import timm_vit
from t5lib.layers.attention import project

IMAGES_AT_ONCE = 16  # bounds the memory at high resolutions


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Shift ratio of every head: ‖mean_i k_i‖ / mean_i‖k_i‖ over the tokens of an image, averaged over images.

    0: keys point everywhere; 1: all keys of an image are one vector. About 0.5 and more in pretrained vision
    transformers, low at random initialization. Softmax ignores the shift; a TTT layer without instance norm does not.

    Attributes:
        layers: names of the attentions.
        shift_ratio, random_init: [layer][head], of the model and of the same architecture with fresh weights.
    """

    layers: tuple[str, ...]
    shift_ratio: tuple[tuple[float, ...], ...]
    random_init: tuple[tuple[float, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> dict[str, float]:
        ratio, control = torch.tensor(self.shift_ratio), torch.tensor(self.random_init)
        return {
            "mean_shift_ratio": ratio.mean().item(),
            "mean_shift_ratio_random_init": control.mean().item(),
            "min": ratio.mean(1).min().item(),
            "max": ratio.mean(1).max().item(),
        }


def diagnose(model: nn.Module, images: Tensor, *, seed: int = 0) -> Diagnosis:
    """Measure the shift ratio of every layer and head on real images.

    Args:
        model: a softmax model that t5lib.convert accepts.
        images: (B, 3, H, W), normalized as the model expects; 16 to 64 are enough.
        seed: of the random-init control.

    Raises:
        T5Error: the model cannot be converted, or is converted already.
    """
    timm_vit.check_convertible(model)
    if images.ndim != 4:
        raise T5Error(f"diagnose expects images (B, 3, H, W), got {tuple(images.shape)}")
    control = timm_vit.fresh_weights(copy.deepcopy(model), seed)
    return Diagnosis(
        layers=tuple(timm_vit.attention_names(model)),
        shift_ratio=_shift_ratios(model, images),
        random_init=_shift_ratios(control, images),
    )


def shift_ratio(k: Tensor) -> Tensor:
    """k (B, H, N, D) to (H,): the norm of the mean key over the mean norm of the keys, averaged over images."""
    k = k.float()
    return (k.mean(2).norm(dim=-1) / k.norm(dim=-1).mean(2)).mean(0)


@torch.no_grad()
def _shift_ratios(model: nn.Module, images: Tensor) -> tuple[tuple[float, ...], ...]:
    """Keys are read as the attention sees them: after the pretrained key norm, where there is one."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name in timm_vit.attention_names(model):
        sums[name] = torch.zeros(())
        hooks.append(model.get_submodule(name).register_forward_pre_hook(_adder(sums, name)))
    training = model.training
    try:
        for part in images.split(IMAGES_AT_ONCE):
            model.eval()(part.to(next(model.parameters())))  # its device and dtype
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return tuple(tuple((total / len(images)).tolist()) for total in sums.values())


def _adder(sums: dict[str, Tensor], name: str):
    """A hook that adds the shift ratios of the images it sees to sums[name], (H,)."""

    def add(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ratios = shift_ratio(project(attention, inputs[0])[1])
        sums[name] = sums[name].to(ratios.device) + ratios * len(inputs[0])

    return add
