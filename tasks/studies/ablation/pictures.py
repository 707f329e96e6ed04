"""One figure a table: every row's models as dots on a line, softmax as reference."""

from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t5lib.report import plots
from tasks.studies.ablation.definition import Table

if TYPE_CHECKING:
    from tasks.studies.ablation.tables import Row

# Model: marker, fill, edge, label. Shape and fill tell them apart as well as colour does.
LOOKS = {
    "calibrated": ("o", "white", plots.MUTED, "before training"),
    "frozen": ("s", plots.T5_LIGHT, plots.T5_LIGHT, "freeze protocol"),
    "finetuned": ("D", plots.T5, plots.T5, "fine-tuned"),
}
REFERENCES = {"control": ("-", "softmax trained alike"), "source": (":", "softmax source")}
BESIDE_A_ROW = {"va": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}  # no grid through it
SPAN = 15.0  # points that the axis shows at most: what differs by one must be seen; values further down are written out


def dots(table: Table, rows: "list[Row]", softmax: dict[str, dict[str, float]]) -> Figure:
    """Mean top-1 of every row; the whisker is the standard deviation over seeds."""
    shown = [model for model in LOOKS if model == "calibrated" or _protocol(model) in table.protocols]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 1.3 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot(title=table.title, xlabel="top-1 accuracy (%)")
        for name, (line, label) in REFERENCES.items():
            if name in softmax:
                axes.axvline(softmax[name]["mean"], color=plots.SOFTMAX, linestyle=line, linewidth=1.3, label=label)
        for model in shown:
            _draw(axes, rows, model)
        floor = _limits(axes, rows, shown, softmax)
        for number, row in enumerate(rows):
            told = " ".join(text for text in (_far_below(row, shown, floor), _missing(row, shown)) if text)
            axes.text(0.01, number - 0.36, told, transform=axes.get_yaxis_transform(), fontsize=7, **BESIDE_A_ROW)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], color=plots.INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        columns = (len(axes.get_legend_handles_labels()[0]) + 1) // 2  # two lines of entries
        figure.legend(loc="outside lower center", ncols=columns, handletextpad=0.3, columnspacing=1.2, fontsize=8)
    return figure


def _draw(axes: Axes, rows: "list[Row]", model: str) -> None:
    marker, fill, edge, label = LOOKS[model]
    found = [(number, values) for number, row in enumerate(rows) if (values := row.top1(model))]
    if found:
        axes.errorbar(
            [values["mean"] for _, values in found],
            [number for number, _ in found],
            xerr=[values["std"] for _, values in found],
            fmt=marker,
            color=fill,
            markeredgecolor=edge,
            ecolor=edge,
            elinewidth=1.2,
            label=label,
        )


def _limits(axes: Axes, rows: "list[Row]", shown: list[str], softmax: dict[str, dict[str, float]]) -> float:
    """As near as the values are, with room for the whiskers; returns the lowest value that is shown."""
    values = [values for row in rows for model in shown if (values := row.top1(model))] + list(softmax.values())
    if not values:
        return 0.0
    high = max(value["mean"] + value["std"] for value in values)
    near = [value["mean"] - value["std"] for value in values if value["mean"] - value["std"] > high - SPAN]
    room = max(0.06 * (high - min(near)), 0.2)
    floor = min(near) - room
    axes.set_xlim(floor, min(high + room, 100.5))
    return floor


def _far_below(row: "Row", shown: list[str], floor: float) -> str:
    """Values left of the axis, in words."""
    below = {LOOKS[model][3]: values["mean"] for model in shown if (values := row.top1(model))}
    return ", ".join(f"◀ {label} {mean:.1f}" for label, mean in below.items() if mean < floor)


def _missing(row: "Row", shown: list[str]) -> str:
    """Why dots are missing, told once where it is the same for all."""
    reasons = {LOOKS[model][3]: row.cell(model) for model in shown if row.top1(model) is None}
    if len(reasons) == len(shown) and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return ", ".join(f"{label}: {reason}" for label, reason in reasons.items() if reason != "–")


def _protocol(model: str) -> str:
    return {"frozen": "freeze", "finetuned": "finetune"}.get(model, "")
