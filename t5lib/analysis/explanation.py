"""What conversion did to a model, layer by layer: where it looks, how far its layers are off, what its keys share.

Shapes: B images, H heads, N image tokens, T text tokens, D head width, C channels, Q queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.analysis.attention_maps import attention_distance, map_of, over_patches, spread_queries
from t5lib.analysis.key_shift import shift_ratio
from t5lib.analysis.similarity import CKA, RelativeError
from t5lib.families import family_of
from t5lib.families.base import Adapter, AttentionCall
from t5lib.families.inputs import Inputs, check_finite, count, first, parts, placed
from t5lib.layers.attention import TTTLayer
from t5lib.layers.grid import TokenGrid, grid_scope
from t5lib.training.pair import check_weights
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating
from t5lib.utils.threads import of_this_thread
from t5lib.utils.weights import check_numbers

TOKENS_AT_ONCE = 4096  # of all images in a pass; every layer's inputs and outputs are held, of both models
MAP_LAYERS, MAP_IMAGES = 4, 2  # how many are pictured
DISTANCES = ("distance_softmax", "distance_converted")
ERRORS = ("layer_error", "block_error", "cka")
SHIFTS = ("shift_softmax", "shift_before", "shift_after", "shift_fitted")
CLASS_TOKENS = {"cls_token", "class_embedding"}  # as models call the parameter
OF_NEW_LAYERS = ("layer_error", "shift_after", "shift_fitted")  # means leave layers out that stayed softmax


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
        images: how many were used.
        layer_error: of the layer's heads on the softmax model's own inputs: squared error over variance, as calibration
            has it.
        block_error: of the image tokens that the block gives as the two models run, errors of earlier blocks included.
        cka: linear CKA between the block outputs as the two models run; 1: alike up to rotation and scale.
        shift_softmax: shift ratio of the softmax model's keys (t5lib.diagnose), mean over heads; text included.
        shift_before, shift_after: of the converted layer's keys before and after its key norm.
        shift_fitted: of the keys that its mixing gets, after the convolution too, whose learned bias is a shift.
            The last two are None for softmax layers, which have no key norm.

        Where attention is over one image and nothing else (Adapter.has_attention_maps), so not of denoisers:
        grid: (rows, columns) of patches.
        map_images: how many of the images distances and maps are of.
        distance_softmax, distance_converted: mean attention distance in patches, each model on its own way.
        distance_uniform: the same for a layer that looks everywhere alike.
        maps: a few attention maps, for pictures.
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
    grid: tuple[int, int] | None = None
    map_images: int = 0
    distance_softmax: tuple[float, ...] | None = None
    distance_converted: tuple[float, ...] | None = None
    distance_uniform: float | None = None
    maps: tuple[AttentionMap, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without what this kind of model does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def summary(self) -> dict[str, float]:
        """Means over the layers (over those converted for layer errors and shifts after), and the weakest CKA."""
        new = [index for index, kind in enumerate(self.kinds) if kind != "softmax"]
        means = {"cka_min": min(self.cka)}
        for name in self._measures():
            values = getattr(self, name)
            counted = [values[index] for index in (new if name in OF_NEW_LAYERS else range(len(values)))]
            if counted:
                means[name] = sum(counted) / len(counted)
        return means if self.distance_uniform is None else means | {"distance_uniform": self.distance_uniform}

    def by_layer(self) -> Iterator[dict[str, float]]:
        """The numbers of each layer, without those that it does not have."""
        for index in range(len(self.layers)):
            values = {name: getattr(self, name)[index] for name in self._measures()}
            yield {name: value for name, value in values.items() if value is not None}

    def _measures(self) -> tuple[str, ...]:
        return (*(DISTANCES if self.distance_softmax else ()), *ERRORS, *SHIFTS)


def explain(
    softmax_model: nn.Module,
    converted_model: nn.Module,
    batch: Any,
    *,
    map_images: int = 4,
    queries: int = 49,
    probes: int = 2,
) -> Explanation:
    """Compare a softmax model with what conversion (and training) made of it.

    Args:
        softmax_model: not converted.
        converted_model: of the same architecture, size and device; layers that stayed softmax are welcome.
        batch: what the models are called with, as t5lib.diagnose takes it; 16 to 64 images are enough.
        map_images: the first so many are used for distances (which differ little between images) and maps.
        queries: patches whose attention distance is taken, spread over the grid; more cost more.
        probes: precision of the maps of converted layers (see implicit_attention).

    Raises:
        T5Error: models that do not belong together, or a batch that is none of theirs.
    """
    adapter = family_of(softmax_model)
    for name, number in {"map_images": map_images, "queries": queries, "probes": probes}.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise T5Error(f"explain: {name} is {number!r:.60}; expected a whole number, 1 or more")
    _check(adapter, softmax_model, converted_model)
    inputs, names = adapter.inputs(batch), adapter.attention_names(softmax_model)
    adapter.check_inputs(softmax_model, inputs)
    check_finite(inputs)
    inputs = placed(inputs, next(softmax_model.parameters()).device, next(softmax_model.parameters()).dtype)
    with evaluating(softmax_model, converted_model):
        measured = _measure(adapter, softmax_model, converted_model, names, inputs)
        seen: dict[str, Any] = {}
        if adapter.has_attention_maps:
            some = first(inputs, map_images)
            seen = _look(adapter, softmax_model, converted_model, names, some, queries, probes)
    return Explanation(
        layers=tuple(names),
        kinds=tuple(kind_of(converted_model.get_submodule(name)) for name in names),
        images=count(inputs),
        **measured,
        **seen,
    )


def kind_of(attention: nn.Module) -> str:
    """The kind, such as "swiglu, dwc_qk"; "softmax" for a layer that was not converted."""
    if not isinstance(attention, TTTLayer):
        return "softmax"
    return f"{attention.mixer.config.inner}, {attention.mixer.config.locality}"


@dataclass
class _LayerSums:
    """Of one layer over the images: errors, CKA, and shift ratios as sums over images of means over heads."""

    layer_error: RelativeError = field(default_factory=RelativeError)
    block_error: RelativeError = field(default_factory=RelativeError)
    cka: CKA = field(default_factory=CKA)
    shifts: dict[str, float] = field(default_factory=dict)

    def add_shift(self, name: str, keys: Tensor) -> None:
        """keys (B, H, N, D)."""
        self.shifts[name] = self.shifts.get(name, 0.0) + shift_ratio(keys).mean().item() * len(keys)


class _Trace:
    """One run of a model: of every attention its call and merged heads, and the image tokens its block gives."""

    def __init__(self, adapter: Adapter, model: nn.Module, names: Sequence[str], inputs: Inputs):
        self.model, self.grid = model, adapter.grid(model, inputs)
        self.calls: dict[str, AttentionCall] = {}
        self.heads: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}

        def keep(name: str):
            def keep_output(_module: nn.Module, _arguments: Any, output: Any) -> None:
                self.blocks[name] = adapter.block_tokens(output)

            return keep_output

        hooks = []
        for name in names:
            hooks += adapter.watch(model.get_submodule(name), self.calls, self.heads, name)
            hooks.append(
                model.get_submodule(adapter.block_name(name)).register_forward_hook(of_this_thread(keep(name)))
            )
        try:
            adapter.call(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def _measure(
    adapter: Adapter, softmax_model: nn.Module, converted_model: nn.Module, names: Sequence[str], inputs: Inputs
) -> dict[str, Any]:
    """Errors, CKA and shift ratios, by name, an entry a layer."""
    layers = {name: _LayerSums() for name in names}
    at_once = max(1, TOKENS_AT_ONCE // adapter.num_tokens(softmax_model, inputs))
    for part in parts(inputs, at_once):
        theirs, ours = (_Trace(adapter, model, names, part) for model in (softmax_model, converted_model))
        for name, layer in layers.items():
            _add(layer, name, adapter, theirs, ours)
    images = count(inputs)
    result: dict[str, tuple[float | None, ...]] = {
        name: tuple(layer.shifts[name] / images if name in layer.shifts else None for layer in layers.values())
        for name in SHIFTS
    }
    for name in ERRORS:
        result[name] = tuple(getattr(layer, name).value() for layer in layers.values())
    return result


def _add(layer: _LayerSums, name: str, adapter: Adapter, theirs: _Trace, ours: _Trace) -> None:
    """Count a run of both models in."""
    softmax, converted = (trace.model.get_submodule(name) for trace in (theirs, ours))
    layer.add_shift("shift_softmax", adapter.project(softmax, theirs.calls[name])[1])
    layer.layer_error.add(_heads_of(adapter, converted, theirs.calls[name], theirs.grid), theirs.heads[name])
    layer.block_error.add(ours.blocks[name], theirs.blocks[name])
    layer.cka.add(ours.blocks[name].flatten(0, 1), theirs.blocks[name].flatten(0, 1))
    if not isinstance(converted, TTTLayer):
        layer.add_shift("shift_before", adapter.project(converted, ours.calls[name])[1])
        return
    mixer, call = converted.mixer, ours.calls[name]
    image, *text = call.tokens[: 1 if mixer.config.text == "exact" else None]  # what the inner model is fitted on
    grid = ours.grid.with_suffix(text[0].shape[1] if text else 0)
    q, k, _ = adapter.project(converted, call.of(mixer.prepare(image, ours.grid), *text))
    layer.add_shift("shift_before", k)
    layer.add_shift("shift_after", mixer.normalized(mixer.rescaled(q, k)[1], grid))
    layer.add_shift("shift_fitted", mixer.localized(q, k, grid)[1])


def _heads_of(adapter: Adapter, attention: nn.Module, call: AttentionCall, grid: TokenGrid) -> Tensor:
    """The merged heads that `attention` makes of another call than its own."""
    heads: dict[str, Tensor] = {}
    hooks = adapter.watch(attention, {}, heads, "it")
    try:
        with grid_scope(grid):
            adapter.call_attention(attention, call)
    finally:
        for hook in hooks:
            hook.remove()
    return heads["it"]


@torch.no_grad()
def _look(
    adapter: Adapter,
    softmax_model: nn.Module,
    converted_model: nn.Module,
    names: Sequence[str],
    inputs: Inputs,
    queries: int,
    probes: int,
) -> dict[str, Any]:
    """Attention distances and maps."""
    sides = [(model, _Trace(adapter, model, names, inputs)) for model in (softmax_model, converted_model)]
    grid = sides[0][1].grid
    spread, shown = spread_queries(grid, queries), _shown(softmax_model, grid)
    pictured = {round(i * (len(names) - 1) / (MAP_LAYERS - 1)) for i in range(MAP_LAYERS)}
    distances: list[list[float]] = [[], []]
    maps: list[AttentionMap] = []
    for index, name in enumerate(names):
        asked, both = spread + list(shown.values()) * (index in pictured), []
        for (model, trace), distance in zip(sides, distances, strict=True):
            call = trace.calls[name]
            mixer = getattr(model.get_submodule(name), "mixer", None)
            if mixer is not None:
                call = call.of(mixer.prepare(*call.tokens, grid))
            qkv = adapter.project(model.get_submodule(name), call)
            weights = map_of(qkv, mixer, grid, queries=asked, probes=probes)
            distance.append(attention_distance(weights[:, :, : len(spread)], spread, grid).mean().item())
            both.append(over_patches(weights[:MAP_IMAGES, :, len(spread) :], grid.num_prefix_tokens).mean(1))
        if index in pictured:
            maps += _maps(index, shown, grid, *both)
    everywhere = torch.ones(1, 1, len(spread), grid.num_prefix_tokens + grid.rows * grid.columns)
    return {
        "grid": (grid.rows, grid.columns),
        "map_images": count(inputs),
        "distance_softmax": tuple(distances[0]),
        "distance_converted": tuple(distances[1]),
        "distance_uniform": attention_distance(everywhere, spread, grid).item(),
        "maps": tuple(maps),
    }


def _shown(model: nn.Module, grid: TokenGrid) -> dict[str, int]:
    """The queries that are pictured, by name."""
    centre = grid.num_prefix_tokens + (grid.rows // 2) * grid.columns + grid.columns // 2
    shown = {"centre": centre, "corner": grid.num_prefix_tokens}
    has_class_token = any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in model.named_parameters())
    return shown | ({"class token": 0} if has_class_token else {})


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


def _check(adapter: Adapter, softmax_model: nn.Module, converted_model: nn.Module) -> None:
    """Raises T5Error when the models do not belong together."""
    try:
        adapter.check_convertible(softmax_model)
    except T5Error as error:
        raise T5Error(f"explain: the first model must be the softmax one: {error}") from None
    theirs, ours = (
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".mixer." not in name}
        for model in (softmax_model, converted_model)
    )
    every = sorted(theirs.keys() | ours.keys())
    other = [f"{n} {theirs.get(n)} and {ours.get(n)}" for n in every if theirs.get(n) != ours.get(n)]
    devices = [str(next(model.parameters()).device) for model in (softmax_model, converted_model)]
    if devices[0] != devices[1]:
        other.append(f"device {devices[0]} and {devices[1]}")
    if other:
        raise T5Error(
            f"explain: the models differ in {'; '.join(other[:3])}: pass a softmax model and its converted one"
        )
    for model, which in ((softmax_model, "the softmax model"), (converted_model, "the converted model")):
        check_numbers(dict(model.named_parameters()), which)
    check_weights(converted_model, softmax_model)
