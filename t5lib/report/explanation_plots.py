"""The pictures of an explanation (t5lib.analysis.explanation): its dictionary in, matplotlib Figures out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from t5lib.report.plots import (
    HEAT,
    MUTED,
    SOFTMAX,
    T5,
    T5_LIGHT,
    T5_PALE,
    WIDTH,
    layer_label,
    log_where_positive,
    new_axes,
    styled,
)


def all_pictures(found: dict[str, Any], pictures: np.ndarray | None) -> dict[str, Figure]:
    """All pictures of an explanation (t5lib.analysis.explanation, as dictionary), by name.

    `pictures`: the images given, each (H, W, 3), 0 to 1, those that have maps at least; None where there are no maps.
    """
    figures = {}
    if pictures is not None:
        for image in sorted({one["image"] for one in found["maps"]}):
            maps = [one for one in found["maps"] if one["image"] == image]
            figures[f"maps-{image}"] = attention_maps(pictures[image], found["layers"], maps)
    return figures | curves(found)


def curves(found: dict[str, Any]) -> dict[str, Figure]:
    """The pictures of an explanation that need no image."""
    similarity = [found[name] for name in ("layer_error", "block_error", "cka")]
    figures = {
        "similarity": layer_similarity(found["layers"], *similarity),
        "shift": shift_by_layer(found["layers"], found),
    }
    if "distance_uniform" in found:  # not of denoisers
        distances = [found[f"distance_{what}"] for what in ("softmax", "converted", "uniform")]
        figures["distance"] = attention_distance(found["layers"], *distances)
    return figures


def as_pictures(images: Any, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A model's input (B, 3, H, W), normalized with mean and std, as pictures (B, H, W, 3), 0 to 1."""
    centre, scale = (np.asarray(values)[:, None, None] for values in (mean, std))
    return np.moveaxis(np.clip(np.asarray(images) * scale + centre, 0, 1), 1, -1)


@styled
def attention_maps(picture: Sequence[Any], layers: Sequence[str], maps: Sequence[dict[str, Any]]) -> Figure:
    """Where a few queries of one image look in a few layers, softmax above converted, over the image itself.

    The stronger a patch, the redder and the less of the image shows through; each map has its own scale, up to its
    strongest patch. A query that is a patch is framed.

    Args:
        picture: (H, W, 3), 0 to 1, as the model saw it.
        layers: names of all layers.
        maps: of t5lib.analysis.explanation.AttentionMap as dictionaries, all of one image.
    """
    queries = list(dict.fromkeys(found["query"] for found in maps))
    shown = sorted({found["layer"] for found in maps})
    grey = np.asarray(picture).mean(-1)
    tall = min(2.0, max(0.8, grey.shape[0] / grey.shape[1]))  # an image's height for its width; the labels need some
    figure = Figure(figsize=(WIDTH, 0.45 + 1.02 * tall * 2 * len(queries)), layout="constrained")
    panels = figure.subplots(2 * len(queries), len(shown), squeeze=False)
    places = {(found["query"], found["layer"]): found for found in maps}
    for row, (query, model) in enumerate((query, model) for query in queries for model in ("softmax", "converted")):
        for axes, layer in zip(panels[row], shown, strict=True):
            _draw_map(axes, grey, places[query, layer], model)
        colour, name = (SOFTMAX, "softmax") if model == "softmax" else (T5, "T5")
        panels[row][0].set_ylabel(f"{query}\n{name}", color=colour, fontsize=8.5)
    for axes, layer in zip(panels[0], shown, strict=True):
        axes.set_title(f"layer {layer_label(layers[layer])}", loc="center", pad=5, fontsize=9)
    return figure


def _draw_map(axes: Axes, grey: np.ndarray, found: dict[str, Any], model: str) -> None:
    height, width = grey.shape
    weights = np.asarray(found[model])
    strength = weights / max(weights.max(), 1e-12)
    frame: dict[str, Any] = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    axes.imshow(grey, cmap="gray", vmin=-1.2, vmax=1.05, **frame)
    axes.imshow(strength, cmap=HEAT, vmin=0, vmax=1, alpha=0.9 * strength**0.7, **frame)
    if found["patch"] is not None:
        rows, columns = weights.shape
        row, column = divmod(found["patch"], columns)
        patch = (column * width / columns, row * height / rows)
        axes.add_patch(Rectangle(patch, width / columns, height / rows, fill=False, edgecolor=SOFTMAX, linewidth=1.3))
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


@styled
def attention_distance(
    layers: Sequence[str], softmax: Sequence[float], converted: Sequence[float], uniform: float
) -> Figure:
    """Mean attention distance of every layer in patches, softmax beside converted, and that of looking everywhere."""
    figure, axes = _by_layer("How far the layers look", "mean distance (patches)", layers)
    rows = range(len(layers))
    axes.axhline(uniform, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label="everywhere alike")
    axes.plot(rows, softmax, "o-", ms=4, color=SOFTMAX, label="softmax")
    axes.plot(rows, converted, "o-", ms=4, color=T5, label="T5")
    axes.set_ylim(0, 1.12 * max(uniform, *softmax, *converted))
    figure.legend(loc="outside lower center", ncols=3, handlelength=1.4)
    return figure


@styled
def layer_similarity(
    layers: Sequence[str], layer_error: Sequence[float], block_error: Sequence[float], cka: Sequence[float]
) -> Figure:
    """How far the converted model is from the softmax model, layer by layer: errors above, CKA below."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    rows = range(len(layers))
    layer_error, block_error = ([value or math.nan for value in errors] for errors in (layer_error, block_error))
    above.plot(rows, layer_error, "o-", ms=4, color=T5_LIGHT, label="layer alone, on softmax's inputs")
    above.plot(rows, block_error, "o-", ms=4, color=T5, label="output of its block, as the models run")
    above.set(title="How far the layers are off", ylabel="error (share of variance)")
    log_where_positive(above, "y", layer_error + block_error)
    below.plot(rows, cka, "o-", ms=4, color=T5)
    below.set(ylabel="CKA (1: alike)", ylim=(min(0.9, *cka) - 0.04, 1.02), xlabel="layer")
    below.set_xticks(rows, [layer_label(name) for name in layers])
    figure.legend(loc="outside lower center", ncols=1, handlelength=1.4)
    return figure


@styled
def shift_by_layer(layers: Sequence[str], shifts: dict[str, Sequence[float | None]]) -> Figure:
    """Shift ratio of the keys of every layer on their way through the converted layers.

    Args:
        layers: names.
        shifts: shift_softmax, shift_before, shift_after and shift_fitted of t5lib.analysis.explanation.Explanation.
    """
    figure, axes = _by_layer("The keys' shift on its way", "shift ratio", layers)
    lines = {
        "shift_softmax": (SOFTMAX, "softmax model"),
        "shift_before": (T5_PALE, "T5, before key norm"),
        "shift_after": (T5_LIGHT, "T5, after key norm"),
        "shift_fitted": (T5, "T5, as fitted on"),
    }
    for name, (colour, label) in lines.items():
        values = [math.nan if value is None else value for value in shifts[name]]
        axes.plot(range(len(layers)), values, "o-", ms=4, color=colour, label=label)
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.4)
    return figure


def _by_layer(title: str, y: str, layers: Sequence[str]) -> tuple[Figure, Axes]:
    figure, axes = new_axes(3.2, title, "layer", y)
    axes.set_xticks(range(len(layers)), [layer_label(name) for name in layers])
    axes.grid(axis="x", visible=False)
    return figure, axes
