"""What a softmax model's keys look like: the shift that all keys of a head share, layer by layer."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t5lib.data.batches import Inputs, run_on, seeded
from t5lib.families import family_of
from t5lib.utils.errors import T5Error

if TYPE_CHECKING:
    from t5lib.training.objectives import Batch, Objective

IMAGES_AT_ONCE = 16  # bounds the memory at high resolutions
DIAGNOSIS = 3  # what tells the noise of a diagnosis from others with the same seed


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


def diagnose(
    model: nn.Module, images: "Tensor | Batch", *, objective: "Objective | None" = None, seed: int = 0
) -> Diagnosis:
    """Measure the shift ratio of every layer and head on real images.

    Args:
        model: a softmax model that t5lib.convert accepts.
        images: (B, 3, H, W), normalized as the model expects; 16 to 64 are enough. For a denoiser latents and
            conditions, as t5lib.training.objectives says; more are needed, for each is seen at one level of noise.
        objective: of a denoiser: noises the latents, at levels drawn as in training.
        seed: of the random-init control, and of the noise.

    Raises:
        T5Error: the model cannot be converted, or is converted already.
    """
    family = family_of(model)
    family.check_convertible(model)
    if objective is None and (not isinstance(images, Tensor) or images.ndim != 4):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise T5Error(f"diagnose expects images (B, 3, H, W), got {found}; a denoiser needs an objective too")
    inputs = images if objective is None else objective.noised(images, seeded(seed, DIAGNOSIS)).inputs
    return Diagnosis(
        layers=tuple(family.attention_names(model)),
        shift_ratio=_shift_ratios(model, family, inputs),
        random_init=_shift_ratios(_fresh(model, family, seed), family, inputs),
    )


def shift_ratio(k: Tensor) -> Tensor:
    """k (B, H, N, D) to (H,): the norm of the mean key over the mean norm of the keys, averaged over images."""
    k = k.float()
    return (k.mean(2).norm(dim=-1) / k.norm(dim=-1).mean(2)).mean(0)


@torch.no_grad()
def _shift_ratios(model: nn.Module, family: ModuleType, inputs: Inputs) -> tuple[tuple[float, ...], ...]:
    """Keys are read as the attention sees them: after the pretrained key norm, with those of text where there are."""
    sums, hooks, count = {}, [], 0
    for name in family.attention_names(model):
        sums[name] = torch.zeros(())
        hooks += _adder(model.get_submodule(name), family, sums, name)
    training, like = model.training, next(model.parameters())
    try:
        for part in _parts(inputs):
            first = part if isinstance(part, Tensor) else part["hidden_states"]
            run_on(model.eval(), _placed(part, like))
            count += len(first)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return tuple(tuple((total / count).tolist()) for total in sums.values())


def _parts(inputs: Inputs) -> Iterator[Inputs]:
    if isinstance(inputs, Tensor):
        yield from inputs.split(IMAGES_AT_ONCE)
    else:
        for parts in zip(*(tensor.split(IMAGES_AT_ONCE) for tensor in inputs.values()), strict=True):
            yield dict(zip(inputs, parts, strict=True))


def _placed(inputs: Inputs, like: Tensor) -> Inputs:
    """In the place and, if they are no numbers of classes or steps, the precision of `like`."""
    if isinstance(inputs, Tensor):
        return inputs.to(like) if inputs.is_floating_point() else inputs.to(like.device)
    return {name: _placed(tensor, like) for name, tensor in inputs.items()}


def _adder(attention: nn.Module, family: ModuleType, sums: dict[str, Tensor], name: str) -> list:
    """Hooks that add the shift ratios of the images that `attention` sees to sums[name], (H,)."""
    tokens, outputs = {}, {}

    def add(*_: Any) -> None:
        given = tokens.pop(name)
        outputs.clear()
        ratios = shift_ratio(family.project(attention, given)[1])
        sums[name] = sums[name].to(ratios.device) + ratios * len(given[0])

    return [*family.watch(attention, tokens, outputs, name), attention.register_forward_hook(add)]


def _fresh(model: nn.Module, family: ModuleType, seed: int) -> nn.Module:
    """A model of this architecture with fresh weights: the control."""
    if hasattr(family, "fresh_weights"):  # timm's models may have been changed since they were made
        return family.fresh_weights(copy.deepcopy(model), seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return family.build(*family.describe(model), None).to(next(model.parameters()))
