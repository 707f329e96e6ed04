"""The pictures of the report: plain data in, matplotlib Figure out. Light background, colour-blind-safe colours.

Figures are drawn at the width at which they are read (about 460 px, a column of the report or a phone), so that
their text keeps its size.
"""

import functools
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from t5lib.report.models import SOFTMAX, T5, T5_LIGHT, T5_PALE  # noqa: F401 (every picture's colours are here)
from t5lib.utils.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, MUTED, RULE, GRID, GROUND = "#1f2328", "#5c6570", "#d9dde2", "#eceff2", "#ffffff"
# Text on a heat map; not INK and GROUND, which are others on a dark page, where a heat map stays what it is.
ON_PALE, ON_STRONG = "#1e2227", "#fefefe"
HEAT = LinearSegmentedColormap.from_list("heat", ["#fdf7ee", "#f5c48b", "#d9620f", "#6d2405"])

_FONTS = ("Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
_INSTALLED = set(font_manager.get_font_names())
STYLE: "dict[RcKeyType, Any]" = {
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
    "grid.color": GRID,
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
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
}
WIDTH, DPI = 4.9, 200  # inches; dots an inch of PNG files


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw in the style of all pictures, whatever the user's own is."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_axes(height: float, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    return figure, axes


@styled
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
    panels[0].set_yticks(range(len(layers)), [layer_label(name) for name in layers])
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels, orientation="horizontal", fraction=0.04, pad=0.03, aspect=45)
    bar.set_label("shift ratio (0: keys share nothing, 1: all keys equal)")
    bar.outline.set_visible(False)
    return figure


def _print_cells(axes: Axes, values: Sequence[Sequence[float]]) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = ON_STRONG if value > 0.6 else ON_PALE
            text = f"{value:.2f}".removeprefix("0")
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def layer_label(name: str) -> str:
    """The number in a layer's name ("blocks.3.attn" is 3; 3i is the attention of the image alone), or the name."""
    number = re.search(r"\d+", name)
    return number.group() + "i" * name.endswith("attn2") if number else name


@styled
def calibration_curve(history: Sequence[dict[str, float]]) -> Figure:
    """Loss of attention transfer (MSE over variance, mean over layers) against step, logarithmic."""
    return _logarithmic_curve(history, "Calibration", "error (share of variance, log scale)")


@styled
def alignment_curve(history: Sequence[dict[str, float]]) -> Figure:
    """Loss of alignment (weighted sum of errors over variances) against step, logarithmic."""
    return _logarithmic_curve(history, "Alignment", "weighted errors (log scale)")


def _logarithmic_curve(history: Sequence[dict[str, float]], title: str, what: str) -> Figure:
    figure, axes = new_axes(3.0, title, "step", what)
    _draw_loss(axes, history, T5)
    log_where_positive(axes, "y", [row["loss"] for row in history if "loss" in row])
    return figure


@styled
def training_curves(histories: dict[str, Sequence[dict[str, float]]], colours: dict[str, str]) -> Figure:
    """Training loss against step, one line a run (by label); raw values faint behind the smoothed ones."""
    figure, axes = new_axes(3.0, "Training", "step", "training loss (cross-entropy)")
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


@styled
def quality_bars(bars: Sequence[dict[str, Any]]) -> Figure:
    """Top-1 accuracy with one standard error.

    Args:
        bars: from top to bottom, each {"label": str, "top1": percent, "error": points, "colour": str}.
    """
    figure, axes = new_axes(0.9 + 0.36 * len(bars), "Accuracy on the test images", "top-1 accuracy (%)", "")
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


@styled
def layer_errors(layers: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Figure:
    """Error of every converted layer against the softmax layer it replaces (MSE over variance), before and after."""
    height = 1.1 + 0.19 * len(layers)
    figure, axes = new_axes(height, "Error of each layer", "error (share of variance, log scale)", "layer")
    rows = range(len(layers))
    axes.hlines(rows, after, before, color=RULE, linewidth=2.5)
    axes.plot(before, rows, "o", color=GROUND, markeredgecolor=MUTED, label="after conversion")
    axes.plot(after, rows, "o", color=T5, label="after calibration")
    log_where_positive(axes, "x", [*before, *after])
    axes.set_yticks(rows, [layer_label(name) for name in layers])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.2)
    return figure


@styled
def speed_curves(rows: Sequence[dict[str, Any]], break_even: int | None) -> Figure:
    """Time of a forward pass against tokens, softmax and T5; the band spans the fastest to the slowest run.

    Args:
        rows: of t5lib.benchmarks.resolution_sweep.benchmark.
        break_even: token count to mark, if there is one.
    """
    figure, axes = _cost_axes("Time", f"ms a pass, batch {rows[0]['batch']} (log scale)", rows, "ms", break_even)
    for model, colour in (("softmax", SOFTMAX), ("t5", T5)):
        line = _line(rows, model)
        lowest, highest = [min(row["ms_runs"]) for row in line], [max(row["ms_runs"]) for row in line]
        axes.fill_between([row["tokens"] for row in line], lowest, highest, color=colour, alpha=0.15, linewidth=0)
    return figure


@styled
def flops_curves(rows: Sequence[dict[str, Any]], break_even: int | None) -> Figure:
    """FLOPs of a forward pass (10⁹, one multiply-add counts as 2) against tokens, softmax and T5."""
    y = f"GFLOPs a pass, batch {rows[0]['batch']} (log scale)"
    return _cost_axes("Arithmetic", y, rows, "gflops", break_even)[0]


def _cost_axes(
    title: str, y: str, rows: Sequence[dict[str, Any]], key: str, break_even: int | None
) -> tuple[Figure, Axes]:
    figure, axes = new_axes(3.3, title, "tokens (log scale)", y)
    for model, label, colour in (("softmax", "softmax", SOFTMAX), ("t5", "T5", T5)):
        line = _line(rows, model)
        axes.plot([row["tokens"] for row in line], [row[key] for row in line], "o-", color=colour, ms=4, label=label)
    axes.set(xscale="log", yscale="log")
    tokens = [row["tokens"] for row in _line(rows, "t5")]
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    plain_log_ticks(axes.yaxis)
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


def plain_log_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, … in plain figures."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def log_where_positive(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic axis, unless none of the values has a place on it: layers may equal softmax exactly."""
    if any(value > 0 for value in values):
        axes.set(**{f"{which}scale": "log"})
        plain_log_ticks(axes.xaxis if which == "x" else axes.yaxis)


def save(figure: Figure, path: Path | str) -> None:
    """Write `figure` to `path` atomically; the ending (.png, .svg) chooses the format."""
    write_bytes(path, _render(figure, Path(path).suffix.removeprefix(".")))


def svg(figure: Figure) -> str:
    """`figure` as an SVG file's text."""
    return _render(figure, "svg").decode()


@styled
def _render(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None  # same data, same bytes
    figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
