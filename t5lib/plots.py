"""The pictures of the report: plain data in, matplotlib Figure out. Light background, colour-blind-safe colours.

Figures are drawn at the width at which they are read (about 460 px, a column of the report or a phone), so that
their text keeps its size.
"""

import base64
import functools
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Blue against vermilion stays apart for every common colour blindness (Okabe and Ito); blue is always softmax.
SOFTMAX, T5, T5_LIGHT, T5_PALE = "#0b63a5", "#cf4f08", "#e8963f", "#f0c08a"
INK, MUTED, RULE = "#1f2328", "#5c6570", "#d9dde2"
HEAT = LinearSegmentedColormap.from_list("heat", ["#fdf7ee", "#f5c48b", "#d9620f", "#6d2405"])

_FONTS = ("Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
_INSTALLED = set(font_manager.get_font_names())
STYLE = {
    "font.family": [name for name in _FONTS if name in _INSTALLED],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "path",  # the page needs no font of the reader's
    "svg.hashsalt": "t5",  # same data, same bytes
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
WIDTH, DPI = 4.9, 200  # inches; dots an inch of PNG files


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def _axes(height: float, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    return figure, axes


@_styled
def shift_ratio_map(
    layers: Sequence[str], shift_ratio: Sequence[Sequence[float]], random_init: Sequence[Sequence[float]]
) -> Figure:
    """Shift ratio (0 to 1) of every head, layers by heads, beside the same model with random weights.

    Args:
        layers: names, one a row.
        shift_ratio, random_init: for each layer one value a head; both on one colour scale, 0 to 1.
    """
    figure = Figure(figsize=(WIDTH, 1.2 + 0.24 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, values in zip(panels, ("Pretrained", "Random weights"), (shift_ratio, random_init), strict=True):
        image = axes.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        axes.set(title=title, xlabel="head")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        if len(values[0]) <= 8:
            _print_cells(axes, values)
    panels[0].set_yticks(range(len(layers)), [_layer_label(name) for name in layers])
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels, orientation="horizontal", fraction=0.04, pad=0.03, aspect=45)
    bar.set_label("shift ratio (0: keys share nothing, 1: all keys equal)")
    bar.outline.set_visible(False)
    return figure


def _print_cells(axes: Axes, values: Sequence[Sequence[float]]) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if value > 0.6 else INK
            text = f"{value:.2f}".removeprefix("0")
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def _layer_label(name: str) -> str:
    """The number in a layer's name ("blocks.3.attn" is 3), or the name itself."""
    number = re.search(r"\d+", name)
    return number.group() if number else name


@_styled
def calibration_curve(history: Sequence[dict[str, float]]) -> Figure:
    """Loss of attention transfer (MSE over variance, mean over layers) against step, logarithmic."""
    figure, axes = _axes(3.0, "Calibration", "step", "error (share of variance, log scale)")
    _draw_loss(axes, history, T5)
    axes.set_yscale("log")
    _plain_log_ticks(axes.yaxis)
    return figure


@_styled
def training_curves(histories: dict[str, Sequence[dict[str, float]]], colours: dict[str, str]) -> Figure:
    """Training loss against step, one line a run (by label); raw values faint behind the smoothed ones."""
    figure, axes = _axes(3.0, "Training", "step", "training loss (cross-entropy)")
    for label, history in histories.items():
        _draw_loss(axes, history, colours[label], label)
    axes.legend(loc="upper right", handlelength=1.4)
    return figure


def _draw_loss(axes: Axes, history: Sequence[dict[str, float]], colour: str, label: str | None = None) -> None:
    points = [(row["step"], row["loss"]) for row in history if "loss" in row]
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=colour, alpha=0.22, linewidth=0.9)
    axes.plot(steps, smooth(losses), color=colour, label=label)


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a fifteenth of the curve around each point (centred, so it does not lag), cut off at the ends."""
    reach = len(values) // 30
    windows = (values[max(0, centre - reach) : centre + reach + 1] for centre in range(len(values)))
    return [sum(window) / len(window) for window in windows]


@_styled
def quality_bars(bars: Sequence[dict[str, Any]]) -> Figure:
    """Top-1 accuracy with one standard error.

    Args:
        bars: from top to bottom, each {"label": str, "top1": percent, "error": points, "colour": str}.
    """
    figure, axes = _axes(0.9 + 0.36 * len(bars), "Accuracy on the test images", "top-1 accuracy (%)", "")
    for row, bar in enumerate(bars):
        axes.barh(row, bar["top1"], height=0.62, color=bar["colour"], xerr=bar["error"], error_kw={"ecolor": INK})
        axes.text(bar["top1"] + bar["error"] + 1.2, row, f"{bar['top1']:.1f}", va="center", weight="bold")
    axes.set_yticks(range(len(bars)), [bar["label"] for bar in bars], color=INK)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    return figure


@_styled
def layer_errors(layers: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Figure:
    """Error of every converted layer against the softmax layer it replaces (MSE over variance), before and after."""
    height = 1.1 + 0.19 * len(layers)
    figure, axes = _axes(height, "Error of each layer", "error (share of variance, log scale)", "layer")
    rows = range(len(layers))
    axes.hlines(rows, after, before, color=RULE, linewidth=2.5)
    axes.plot(before, rows, "o", color="white", markeredgecolor=MUTED, label="after conversion")
    axes.plot(after, rows, "o", color=T5, label="after calibration")
    axes.set_xscale("log")
    _plain_log_ticks(axes.xaxis)
    axes.set_yticks(rows, [_layer_label(name) for name in layers])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.2)
    return figure


@_styled
def attention_maps(picture: Sequence[Any], layers: Sequence[str], maps: Sequence[dict[str, Any]]) -> Figure:
    """Where a few queries of one image look in a few layers, softmax above converted, over the image itself.

    The stronger a patch, the redder and the less of the image shows through; each map has its own scale, up to its
    strongest patch. A query that is a patch is framed.

    Args:
        picture: (H, W, 3), 0 to 1, as the model saw it.
        layers: names of all layers.
        maps: of t5lib.explanation.AttentionMap as dictionaries, all of one image.
    """
    queries = list(dict.fromkeys(found["query"] for found in maps))
    shown = sorted({found["layer"] for found in maps})
    figure = Figure(figsize=(WIDTH, 0.45 + 1.02 * 2 * len(queries)), layout="constrained")
    panels = figure.subplots(2 * len(queries), len(shown), squeeze=False)
    places = {(found["query"], found["layer"]): found for found in maps}
    grey = np.asarray(picture).mean(-1)
    for row, (query, model) in enumerate((query, model) for query in queries for model in ("softmax", "converted")):
        for axes, layer in zip(panels[row], shown, strict=True):
            _draw_map(axes, grey, places[query, layer], model)
        colour, name = (SOFTMAX, "softmax") if model == "softmax" else (T5, "T5")
        panels[row][0].set_ylabel(f"{query}\n{name}", color=colour, fontsize=8.5)
    for axes, layer in zip(panels[0], shown, strict=True):
        axes.set_title(f"layer {_layer_label(layers[layer])}", loc="center", pad=5, fontsize=9)
    return figure


def _draw_map(axes: Axes, grey: np.ndarray, found: dict[str, Any], model: str) -> None:
    height, width = grey.shape
    weights = np.asarray(found[model])
    strength = weights / max(weights.max(), 1e-12)
    frame = {"extent": (0, width, height, 0), "interpolation": "nearest"}
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


@_styled
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


@_styled
def layer_similarity(
    layers: Sequence[str], layer_error: Sequence[float], block_error: Sequence[float], cka: Sequence[float]
) -> Figure:
    """How far the converted model is from the softmax model, layer by layer: errors above, CKA below."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    rows = range(len(layers))
    above.plot(rows, layer_error, "o-", ms=4, color=T5_LIGHT, label="layer alone, on softmax's inputs")
    above.plot(rows, block_error, "o-", ms=4, color=T5, label="output of its block, as the models run")
    above.set(title="How far the layers are off", ylabel="error (share of variance)", yscale="log")
    _plain_log_ticks(above.yaxis)
    below.plot(rows, cka, "o-", ms=4, color=T5)
    below.set(ylabel="CKA (1: alike)", ylim=(min(0.9, *cka) - 0.04, 1.02), xlabel="layer")
    below.set_xticks(rows, [_layer_label(name) for name in layers])
    figure.legend(loc="outside lower center", ncols=1, handlelength=1.4)
    return figure


@_styled
def shift_by_layer(layers: Sequence[str], shifts: dict[str, Sequence[float | None]]) -> Figure:
    """Shift ratio of the keys of every layer on their way through the converted layers.

    Args:
        layers: names.
        shifts: shift_softmax, shift_before, shift_after and shift_fitted of t5lib.explanation.Explanation.
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
    figure, axes = _axes(3.2, title, "layer", y)
    axes.set_xticks(range(len(layers)), [_layer_label(name) for name in layers])
    axes.grid(axis="x", visible=False)
    return figure, axes


@_styled
def speed_curves(rows: Sequence[dict[str, Any]], break_even: int | None) -> Figure:
    """Time of a forward pass against tokens, softmax and T5; the band spans the fastest to the slowest run.

    Args:
        rows: of t5lib.benchmark.benchmark.
        break_even: token count to mark, if there is one.
    """
    figure, axes = _cost_axes("Time", f"ms a pass, batch {rows[0]['batch']} (log scale)", rows, "ms", break_even)
    for model, colour in (("softmax", SOFTMAX), ("t5", T5)):
        line = _line(rows, model)
        lowest, highest = [min(row["ms_runs"]) for row in line], [max(row["ms_runs"]) for row in line]
        axes.fill_between([row["tokens"] for row in line], lowest, highest, color=colour, alpha=0.15, linewidth=0)
    return figure


@_styled
def flops_curves(rows: Sequence[dict[str, Any]], break_even: int | None) -> Figure:
    """FLOPs of a forward pass (10⁹, one multiply-add counts as 2) against tokens, softmax and T5."""
    y = f"GFLOPs a pass, batch {rows[0]['batch']} (log scale)"
    return _cost_axes("Arithmetic", y, rows, "gflops", break_even)[0]


def _cost_axes(
    title: str, y: str, rows: Sequence[dict[str, Any]], key: str, break_even: int | None
) -> tuple[Figure, Axes]:
    figure, axes = _axes(3.3, title, "tokens (log scale)", y)
    for model, label, colour in (("softmax", "softmax", SOFTMAX), ("t5", "T5", T5)):
        line = _line(rows, model)
        axes.plot([row["tokens"] for row in line], [row[key] for row in line], "o-", color=colour, ms=4, label=label)
    axes.set(xscale="log", yscale="log")
    tokens = [row["tokens"] for row in _line(rows, "t5")]
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain_log_ticks(axes.yaxis)
    if break_even is not None and break_even > tokens[0]:
        axes.axvline(break_even, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate(
            f"break-even\n{break_even:,} tokens",
            (break_even, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=MUTED,
        )
    axes.legend(loc="upper left", handlelength=1.4)
    return figure, axes


def _line(rows: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row["model"] == model), key=lambda row: row["tokens"])


def _plain_log_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, … in plain figures."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path | str) -> None:
    """Write `figure` to `path` atomically; the ending (.png, .svg) chooses the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(_render(figure, path.suffix.removeprefix(".")))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def data_uri(figure: Figure) -> str:
    """`figure` as an SVG that an HTML page carries inside itself, as the src of an img."""
    return "data:image/svg+xml;base64," + base64.b64encode(_render(figure, "svg")).decode()


@_styled
def _render(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None  # same data, same bytes
    figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
