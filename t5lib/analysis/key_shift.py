"""What a softmax model's keys look like: the shift that all keys of a head share, layer by layer."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.families import family_of
from t5lib.families.base import Adapter, AttentionCall
from t5lib.families.inputs import Inputs, check_finite, count, parts, placed
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating
from t5lib.utils.seeds import check_seed
from t5lib.utils.threads import of_this_thread
from t5lib.utils.weights import check_numbers

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


def diagnose(model: nn.Module, batch: Any, *, seed: int = 0) -> Diagnosis:
    """Measure the shift ratio of every layer and head on real images.

    Args:
        model: a softmax model that t5lib.convert accepts.
        batch: what it is called with: images (B, 3, H, W), normalized as the model expects, 16 to 64 are enough; the
            keyword arguments of a denoiser (t5lib.training.objectives.noised_batch makes them of latents), of which
            more are needed, for each latent is seen at one level of noise.
        seed: of the random-init control.

    Raises:
        T5Error: the model cannot be converted, is converted already, or has weights that are not finite.
    """
    adapter = family_of(model)
    adapter.check_convertible(model)
    if next(model.parameters()).is_meta:
        raise T5Error("the model is on the meta device and has no weights; load them before it is diagnosed")
    check_numbers(dict(model.named_parameters()), "the model")
    inputs = adapter.inputs(batch)
    adapter.check_inputs(model, inputs)
    check_finite(inputs)
    return Diagnosis(
        layers=tuple(adapter.attention_names(model)),
        shift_ratio=_shift_ratios(model, adapter, inputs),
        random_init=_shift_ratios(adapter.fresh(model, check_seed(seed)), adapter, inputs),
    )


def shift_ratio(k: Tensor) -> Tensor:
    """k (B, H, N, D) to (H,): the norm of the mean key over the mean norm of the keys, averaged over images."""
    k = k.float()
    return (k.mean(2).norm(dim=-1) / k.norm(dim=-1).mean(2)).mean(0)


@torch.no_grad()
def _shift_ratios(model: nn.Module, adapter: Adapter, inputs: Inputs) -> tuple[tuple[float, ...], ...]:
    """Keys are read as softmax sees them: after the pretrained key norm and rotation, with text's if there are any."""
    sums, hooks = {}, []
    for name in adapter.attention_names(model):
        sums[name] = torch.zeros(())
        hooks += _adder(model.get_submodule(name), adapter, sums, name)
    like = next(model.parameters())
    try:
        with evaluating(model):
            for part in parts(inputs, IMAGES_AT_ONCE):
                adapter.call(model, placed(part, like.device, like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(tuple((total / count(inputs)).tolist()) for total in sums.values())


def _adder(attention: nn.Module, adapter: Adapter, sums: dict[str, Tensor], name: str) -> list:
    """Hooks that add the shift ratios of the images that `attention` sees to sums[name], (H,)."""
    calls: dict[str, AttentionCall] = {}

    def add(*_: Any) -> None:
        call = calls.pop(name)
        ratios = shift_ratio(adapter.project(attention, call)[1])
        sums[name] = sums[name].to(ratios.device) + ratios * len(call.tokens[0])

    return [*adapter.watch(attention, calls, {}, name), attention.register_forward_hook(of_this_thread(add))]
