"""What conversion did to a denoiser, attention by attention: how far its layers are off, what its keys share.

The numbers are those of t5lib.analysis.explanation, on noised latents. Attention maps and distances are not among them: they
change with the level of noise, and in joint attention a token looks at text, which has no place in the image.

Shapes: B latents, N image tokens, T text tokens, C channels, H heads, D head width.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from t5kernels import key_norm
from torch import Tensor, nn

from t5lib.analysis.layer_sums import SHIFTS, LayerSums, evaluating, kind_of, measured
from t5lib.data.batches import seeded
from t5lib.families import family_of
from t5lib.layers.attention import TTTLayer
from t5lib.training.objectives import Batch, Objective
from t5lib.utils.errors import T5Error

EXPLANATION = 4  # what tells the noise of an explanation from others with the same seed
AT_ONCE = 2  # latents in a pass; every layer's inputs and outputs are held, of both models


@dataclass(frozen=True, kw_only=True)
class DenoiserExplanation:
    """Softmax model and converted model side by side; every sequence has one entry an attention.

    Attributes:
        layers: names of the attentions.
        kinds: what each is in the converted model, such as "swiglu, dwc_qk", or "softmax" where it was left.
        images: how many latents were used, each at one level of noise.
        layer_error: of the attention's heads on the softmax model's own inputs: squared error over variance.
        block_error: of the image tokens that its block gives as the two models run, earlier errors included.
        cka: linear CKA between these.
        shift_softmax, shift_before, shift_after, shift_fitted: see t5lib.analysis.explanation.Explanation; text included.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    images: int
    layer_error: tuple[float, ...]
    block_error: tuple[float, ...]
    cka: tuple[float, ...]
    shift_softmax: tuple[float, ...]
    shift_before: tuple[float, ...]
    shift_after: tuple[float | None, ...]
    shift_fitted: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def by_layer(self) -> Iterator[dict[str, float]]:
        """The numbers of each attention, without those that it does not have."""
        names = ("layer_error", "block_error", "cka", *SHIFTS)
        for index in range(len(self.layers)):
            values = {name: getattr(self, name)[index] for name in names}
            yield {name: value for name, value in values.items() if value is not None}

    def summary(self) -> dict[str, float]:
        """Means over the attentions, of those that have the number; and the weakest CKA."""
        found: dict[str, list[float]] = {}
        for values in self.by_layer():
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()} | {"cka_min": min(self.cka)}


@torch.no_grad()
def explain_denoiser(
    softmax: nn.Module, converted: nn.Module, batch: Batch, *, objective: Objective, seed: int = 0
) -> DenoiserExplanation:
    """Compare a denoiser with what conversion (and training) made of it.

    Args:
        softmax: diffusers' SD3Transformer2DModel or DiTTransformer2DModel, not converted.
        converted: of the same architecture and device; attentions that stayed softmax are welcome.
        batch: latents and conditions (t5lib.training.objectives); each latent is seen at one level of noise.
        objective: noises the latents, at levels drawn as in training.

    Raises:
        T5Error: models that do not belong together.
    """
    family, names = family_of(softmax), _check(softmax, converted)
    layers = {name: LayerSums() for name in names}
    inputs = objective.noised(batch, seeded(seed, EXPLANATION)).inputs
    count = len(inputs["hidden_states"])
    with evaluating(softmax), evaluating(converted):
        for start in range(0, count, AT_ONCE):
            part = {name: value[start : start + AT_ONCE].to(softmax.device) for name, value in inputs.items()}
            theirs, ours = (_Trace(model, family, names, part) for model in (softmax, converted))
            for name, layer in layers.items():
                _add(layer, name, family, theirs, ours)
    kinds = tuple(kind_of(converted.get_submodule(name)) for name in names)
    return DenoiserExplanation(layers=tuple(names), kinds=kinds, images=count, **measured(layers, count))


class _Trace:
    """One run of a model: of every attention its tokens and merged heads, and the image tokens its block gives."""

    def __init__(self, model: nn.Module, family: ModuleType, names: list[str], inputs: dict[str, Tensor]):
        self.model = model
        self.tokens: dict[str, tuple[Tensor, ...]] = {}
        self.heads: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}
        hooks = []
        for name in names:
            hooks += family.watch(model.get_submodule(name), self.tokens, self.heads, name)
            block = model.get_submodule(name.rpartition(".")[0])
            hooks.append(block.register_forward_hook(self._keep(name)))
        try:
            model(**inputs, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str):
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.blocks[name] = output[-1] if isinstance(output, tuple) else output  # after the text's

        return keep


def _add(layer: LayerSums, name: str, family: ModuleType, theirs: _Trace, ours: _Trace) -> None:
    softmax, converted = (trace.model.get_submodule(name) for trace in (theirs, ours))
    layer.add_shift("shift_softmax", family.project(softmax, theirs.tokens[name])[1])
    layer.layer_error.add(_heads_of(converted, family, theirs.tokens[name]), theirs.heads[name])
    layer.block_error.add(ours.blocks[name], theirs.blocks[name])
    layer.cka.add(ours.blocks[name].flatten(0, 1), theirs.blocks[name].flatten(0, 1))
    q, k, _ = family.project(converted, ours.tokens[name])
    layer.add_shift("shift_before", k)
    if isinstance(converted, TTTLayer):
        mixer, grid = converted.mixer, converted.grid_of(ours.tokens[name])
        config = mixer.config
        layer.add_shift("shift_after", key_norm(mixer.rescaled(q, k)[1], config.key_norm, config.key_norm_eps))
        layer.add_shift("shift_fitted", mixer.localized(q, k, grid)[1])


def _heads_of(attention: nn.Module, family: ModuleType, tokens: tuple[Tensor, ...]) -> Tensor:
    """The merged heads that `attention` makes of other tokens than those it got."""
    heads: dict[str, Tensor] = {}
    hooks = family.watch(attention, {}, heads, "it")
    try:
        attention(**dict(zip(("hidden_states", "encoder_hidden_states"), tokens, strict=False)))
    finally:
        for hook in hooks:
            hook.remove()
    return heads["it"]


def _check(softmax: nn.Module, converted: nn.Module) -> list[str]:
    family = family_of(softmax)
    try:
        family.check_convertible(softmax)
    except T5Error as error:
        raise T5Error(f"explain: the first model must be the softmax one: {error}") from None
    theirs, ours = ({name: t.shape for name, t in model.state_dict().items()} for model in (softmax, converted))
    other = [name for name in theirs if ours.get(name) != theirs[name]]
    if other:
        raise T5Error(f"explain: the models differ in {other[0]}; pass the softmax model and what was made of it")
    return family.attention_names(softmax)
