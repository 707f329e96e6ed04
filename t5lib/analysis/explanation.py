"""What conversion did to a model, layer by layer: where it looks, how far its layers are off, what its keys share.

Shapes: B images, H heads, N tokens, D head width, C channels, Q queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from t5kernels import key_norm
from torch import Tensor, nn

from t5lib.analysis.attention_maps import (
    attention_distance,
    implicit_attention,
    mixed,
    over_patches,
    projections,
    spread_queries,
)
from t5lib.analysis.layer_sums import LayerSums, evaluating, kind_of, measured
from t5lib.families import timm_vit
from t5lib.layers.attention import TTTAttention
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

TOKENS_AT_ONCE = 4096  # of all images in a pass; every layer's inputs and outputs are held, of both models
MAP_LAYERS, MAP_IMAGES = 4, 2  # how many are pictured


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """What one query of one image attends to in one layer, mean over heads; each map over the patches sums to 1.

    Attributes:
        image: index into the images given.
        layer: index into Explanation.layers.
        query: "centre", "corner" or "class token".
        patch: its index among the patches, None for the class token.
        softmax, converted: rows × columns.
    """

    image: int
    layer: int
    query: str
    patch: int | None
    softmax: tuple[tuple[float, ...], ...]
    converted: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Softmax model and converted model side by side; every sequence has one entry a layer.

    Attributes:
        layers: names of the attentions.
        kinds: what each is in the converted model, such as "swiglu, dwc_qk", or "softmax" where it was left.
        grid: (rows, columns) of patches.
        images, map_images: how many were used, and how many of them for distances and maps.
        distance_softmax, distance_converted: mean attention distance in patches, each model on its own way.
        distance_uniform: the same for a layer that looks everywhere alike.
        layer_error: of the converted layer's heads on the softmax model's own inputs: squared error over variance, as
            calibration has it.
        block_error: of the block's output as the two models run, errors of earlier blocks included.
        cka: linear CKA between the block outputs as the two models run; 1: alike up to rotation and scale.
        shift_softmax: shift ratio of the softmax model's keys (t5lib.diagnose), mean over heads.
        shift_before, shift_after: of the converted layer's keys before and after its key norm.
        shift_fitted: of the keys that its mixing gets, after the convolution too, whose learned bias is a shift.
            The last two are None for softmax layers, which have no key norm.
        maps: a few attention maps, for pictures.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    grid: tuple[int, int]
    images: int
    map_images: int
    distance_softmax: tuple[float, ...]
    distance_converted: tuple[float, ...]
    distance_uniform: float
    layer_error: tuple[float, ...]
    block_error: tuple[float, ...]
    cka: tuple[float, ...]
    shift_softmax: tuple[float, ...]
    shift_before: tuple[float, ...]
    shift_after: tuple[float | None, ...]
    shift_fitted: tuple[float | None, ...]
    maps: tuple[AttentionMap, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> dict[str, float]:
        """Means over the layers (over those converted for layer errors and shifts after), and the weakest CKA."""
        names = ("distance_softmax", "distance_converted", "block_error", "cka", "shift_softmax", "shift_before")
        found = {name: _mean(getattr(self, name)) for name in names}
        found |= {"cka_min": min(self.cka), "distance_uniform": self.distance_uniform}
        new = [index for index, kind in enumerate(self.kinds) if kind != "softmax"]
        for name in ("layer_error", "shift_after", "shift_fitted"):
            if new:
                found[name] = _mean([getattr(self, name)[index] for index in new])
        return found

    def by_layer(self) -> Iterator[dict[str, float]]:
        """The numbers of each layer, without those that it does not have."""
        names = ("distance_softmax", "distance_converted", "layer_error", "block_error", "cka")
        names += ("shift_softmax", "shift_before", "shift_after", "shift_fitted")
        for index in range(len(self.layers)):
            values = {name: getattr(self, name)[index] for name in names}
            yield {name: value for name, value in values.items() if value is not None}


def explain(
    softmax_model: nn.Module,
    converted_model: nn.Module,
    images: Tensor,
    *,
    map_images: int = 4,
    queries: int = 49,
    probes: int = 2,
) -> Explanation:
    """Compare a softmax model with what conversion (and training) made of it.

    Args:
        softmax_model: not converted.
        converted_model: of the same architecture, size and device; layers that stayed softmax are welcome.
        images: (B, 3, H, W), normalized as the models expect; 16 to 64 are enough.
        map_images: the first so many are used for distances (which differ little between images) and maps.
        queries: patches whose attention distance is taken, spread over the grid; more cost more.
        probes: precision of the maps of converted layers (see implicit_attention).

    Raises:
        T5Error: models that do not belong together, or images that are none.
    """
    names = _check(softmax_model, converted_model, images)
    with evaluating(softmax_model), evaluating(converted_model):
        found = _measure(softmax_model, converted_model, names, images)
        seen = _look(softmax_model, converted_model, names, images[:map_images], queries, probes)
    return Explanation(
        layers=tuple(names),
        kinds=tuple(kind_of(converted_model.get_submodule(name)) for name in names),
        images=len(images),
        map_images=min(map_images, len(images)),
        **found,
        **seen,
    )


@torch.no_grad()
def _measure(
    softmax_model: nn.Module, converted_model: nn.Module, names: list[str], images: Tensor
) -> dict[str, tuple[float | None, ...]]:
    """Errors, CKA and shift ratios, by name and layer."""
    layers = {name: LayerSums() for name in names}
    for part in _parts(softmax_model, images):
        theirs, ours = _trace(softmax_model, names, part), _trace(converted_model, names, part)
        for name, layer in layers.items():
            attentions = (model.get_submodule(name) for model in (softmax_model, converted_model))
            _add(layer, *attentions, *theirs[name], *ours[name])
    return measured(layers, len(images))


def _add(
    layer: LayerSums,
    softmax: nn.Module,
    converted: nn.Module,
    x: Tensor,
    block: Tensor,
    own_x: Tensor,
    own_block: Tensor,
) -> None:
    """Count some images in: x and block are the softmax model's input of the layer and output of its block, own_x and
    own_block the converted model's."""
    q, k, v = projections(softmax, x)
    layer.add_shift("shift_softmax", k)
    wanted = mixed(softmax, q, k, v)
    layer.layer_error.add(mixed(converted, *projections(converted, x.to(own_x.dtype))), wanted)
    layer.block_error.add(own_block, block)
    layer.cka.add(own_block.flatten(0, 1), block.flatten(0, 1))
    q, k, v = projections(converted, own_x)
    layer.add_shift("shift_before", k)
    if isinstance(converted, TTTAttention):
        layer.add_shift("shift_after", _normed(converted, q, k))
        layer.add_shift("shift_fitted", converted.mixer.localized(q, k, converted.grid)[1])


def _normed(layer: TTTAttention, q: Tensor, k: Tensor) -> Tensor:
    """The keys (B, H, N, D) after rescaling and key norm."""
    mixer = layer.mixer
    return key_norm(mixer.rescaled(q, k)[1], mixer.config.key_norm, mixer.config.key_norm_eps)


@torch.no_grad()
def _look(
    softmax_model: nn.Module, converted_model: nn.Module, names: list[str], images: Tensor, queries: int, probes: int
) -> dict[str, Any]:
    """Attention distances and maps."""
    grid = TokenGrid(*softmax_model.patch_embed.grid_size, num_prefix_tokens=softmax_model.num_prefix_tokens)
    with timm_vit.follow_images(softmax_model, grid):
        sides = [(model, _trace(model, names, images)) for model in (softmax_model, converted_model)]
    spread, shown = spread_queries(grid, queries), _shown(softmax_model, grid)
    pictured = {round(i * (len(names) - 1) / (MAP_LAYERS - 1)) for i in range(MAP_LAYERS)}
    distances: list[list[float]] = [[], []]
    maps: list[AttentionMap] = []
    for index, name in enumerate(names):
        asked, found = spread + list(shown.values()) * (index in pictured), []
        for (model, trace), distance in zip(sides, distances, strict=True):
            weights = implicit_attention(model.get_submodule(name), trace[name][0], queries=asked, probes=probes)
            distance.append(attention_distance(weights[:, :, : len(spread)], spread, grid).mean().item())
            found.append(over_patches(weights[:MAP_IMAGES, :, len(spread) :], grid.num_prefix_tokens).mean(1))
        if index in pictured:
            maps += _maps(index, shown, grid, *found)
    everywhere = torch.ones(1, 1, len(spread), grid.num_prefix_tokens + grid.rows * grid.columns)
    return {
        "grid": (grid.rows, grid.columns),
        "distance_softmax": tuple(distances[0]),
        "distance_converted": tuple(distances[1]),
        "distance_uniform": attention_distance(everywhere, spread, grid).item(),
        "maps": tuple(maps),
    }


def _shown(model: nn.Module, grid: TokenGrid) -> dict[str, int]:
    """The queries that are pictured, by name."""
    centre = grid.num_prefix_tokens + (grid.rows // 2) * grid.columns + grid.columns // 2
    shown = {"centre": centre, "corner": grid.num_prefix_tokens}
    return shown | ({"class token": 0} if getattr(model, "has_class_token", False) else {})


def _maps(layer: int, shown: dict[str, int], grid: TokenGrid, softmax: Tensor, converted: Tensor) -> list[AttentionMap]:
    """softmax, converted: (B, Q, rows · columns)."""
    prefix = grid.num_prefix_tokens

    def rows(weights: Tensor) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(f"{value:.4g}") for value in row) for row in weights.view(grid.rows, -1).tolist())

    return [
        AttentionMap(
            image=image,
            layer=layer,
            query=query,
            patch=token - prefix if token >= prefix else None,
            softmax=rows(softmax[image, position]),
            converted=rows(converted[image, position]),
        )
        for image in range(len(softmax))
        for position, (query, token) in enumerate(shown.items())
    ]


def _trace(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each attention its input and its block's output, both (B, N, C)."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    hooks = []
    for name in names:
        block = model.get_submodule(name.rpartition(".")[0])
        keep_input = lambda _, given, name=name: inputs.__setitem__(name, given[0])  # noqa: E731
        keep_output = lambda _, given, made, name=name: outputs.__setitem__(name, made)  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep_input))
        hooks.append(block.register_forward_hook(keep_output))
    try:
        model(images.to(next(model.parameters())))  # its device and dtype
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (inputs[name], outputs[name]) for name in names}


def _parts(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    return images.split(max(1, TOKENS_AT_ONCE // (rows * columns)))


def _check(softmax_model: nn.Module, converted_model: nn.Module, images: Tensor) -> list[str]:
    """The names of the attentions. Raises T5Error when the models do not belong together."""
    try:
        timm_vit.check_convertible(softmax_model)
    except T5Error as error:
        raise T5Error(f"explain: the first model must be the softmax one: {error}") from None
    if images.ndim != 4 or not len(images):
        raise T5Error(f"explain expects images (B, 3, H, W), got {tuple(images.shape)}")
    theirs, ours = _shape(softmax_model), _shape(converted_model)
    different = [f"{what} {theirs[what]} and {ours.get(what)}" for what in theirs if theirs[what] != ours.get(what)]
    if different:
        raise T5Error(
            f"explain: the models differ in {', '.join(different)}; pass the softmax model and what was made of it"
        )
    return timm_vit.attention_names(softmax_model)


def _shape(model: nn.Module) -> dict[str, Any]:
    """What two models must have in common to be compared layer by layer."""
    if not hasattr(model, "patch_embed") or not hasattr(model, "blocks"):
        return {"class": type(model).__name__}
    attentions = [model.get_submodule(name) for name in timm_vit.attention_names(model)]
    return {
        "class": type(model).__name__,
        "layers": len(attentions),
        "width": model.embed_dim,
        "heads": [a.num_heads for a in attentions],
        "head width": [a.head_dim for a in attentions],
        "prefix tokens": model.num_prefix_tokens,
        "patch size": model.patch_embed.patch_size,
        "image size": model.patch_embed.img_size,
        "device": next(model.parameters()).device,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
