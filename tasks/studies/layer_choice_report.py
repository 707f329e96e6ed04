"""The result of tasks.studies.layer_choice as summary, Markdown table and picture."""

import re
import statistics
from collections import defaultdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t5lib.report import plots
from t5lib.utils import markdown
from tasks.studies.common import plus_minus, spread

MARKERS = {"first": "v", "last": "^", "evenly spaced": "s", "all": "D"}
COLOURS = (plots.MUTED, plots.T5_LIGHT, plots.T5_PALE)  # of the rules, by kind
SOLVER, BY_SUM, SOFTMAX = "solver", "solver, by the sum alone", "softmax"
AXES, DIGITS = {"top1": "top-1 accuracy (%)", "loss": "loss"}, {"top1": 2, "loss": 4}
NO_RULES = (SOLVER, BY_SUM, SOFTMAX)


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Over seeds, for each budget: mean and spread of every map by name, and the solver beside the best fixed rule."""
    runs = [run["compared"] for run in result["seeds"].values()]
    budgets = []
    for index, budget in enumerate(map(dict, result["budgets"])):
        named: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            for row in run[index]:
                named[row["name"]].append(row)
        rows = {name: _over_seeds(of_name) for name, of_name in named.items()}
        rules = {name: row for name, row in rows.items() if name not in NO_RULES}
        best = min(rules, key=lambda name: rules[name]["loss"]["mean"])
        budget |= {"rows": rows, "best_rule": best, "best_rule_behind": rules[best]["behind"]}
        if "top1" in rows[SOLVER]:  # in points, against the rule that is best by this measure
            top1 = max(row["top1"]["mean"] for row in rules.values())
            budget["top1_ahead"] = rows[SOLVER]["top1"]["mean"] - top1
        budgets.append(budget)
    deviations = [abs(row["deviation"]) for row in result["verified"]]
    return {
        "budgets": budgets,
        "largest_deviation": max(deviations, default=None),
        "solver_no_worse": all(budget["best_rule_behind"]["mean"] >= 0 for budget in budgets) if budgets else None,
    }


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    spreads = {key: spread([row[key] for row in rows]) for key in ("loss", "top1", "cost", "behind") if key in rows[0]}
    spreads["behind"]["image_error"] = statistics.mean(row["behind_error"] for row in rows)
    return spreads | {"layers": [row["layers"] for row in rows], "seeds": len(rows)}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    plan, summary, settings = result["plan"], result["summary"], result["settings"]
    seeds = ", ".join(result["seeds"])
    lines = [
        f"# Plan and layer choice, {plan['resolution']} px",
        "",
        f"Device: {result['device']}, torch {result['torch']}, {plan['dtype']}"
        f"{', torch.compile' if plan['compiled'] else ''}{', CUDA graphs' if plan['graphs'] else ''}; "
        f"{plan['config']['batch']} images a pass, median of {plan['config']['repeats']} (at most "
        f"{100 * plan['unrest']:.0f}% above the fastest).",
        f"Calibration: {settings['calibrate']['steps']} steps a kind, no labels; no fine-tune. Seeds {seeds}.",
        "",
        f"{plan['verdict']} {plan.get('advice', '')}".rstrip(),
        "",
        *_times(result),
        "",
        *_scan(result),
    ]
    for budget in summary["budgets"]:
        lines += ["", *_budget(budget, result)]
    return "\n".join([*lines, "", *_conclusion(summary), ""])


def _conclusion(summary: dict[str, Any]) -> list[str]:
    if not summary["budgets"]:
        return ["No kind costs less than softmax here, so there is no budget to choose layers for."]
    ending = "at every budget" if summary["solver_no_worse"] else "not at every budget"
    lines = [f"The solver's loss is no higher than any fixed rule's: {ending} (mean over seeds)."]
    ahead = [budget["top1_ahead"] for budget in summary["budgets"] if "top1_ahead" in budget]
    if ahead:
        points = ", ".join(f"{value:+.2f}" for value in ahead)
        lines.append(f"Its top-1 minus that of the rule with the best top-1, budget by budget: {points} points.")
    return lines


def _times(result: dict[str, Any]) -> list[str]:
    """Predicted and measured times; the first row is softmax, against which the speed-ups are."""
    columns = ["layers", "predicted ms", "measured ms", "deviation", "predicted speed-up", "measured speed-up"]
    columns += ["measured ms without CUDA graph", "error against float64"]
    softmax = result["verified"][0]
    rows = [
        [
            _layers(row["layers"]),
            *(f"{row[key]:.3f}" for key in ("predicted_ms", "measured_ms")),
            f"{100 * row['deviation']:+.1f}%",
            *(f"{softmax[key] / row[key]:.2f}x" for key in ("predicted_ms", "measured_ms")),
            f"{row['launched_ms']:.3f}" if row["launched_ms"] else "–",
            f"{row['relative_error']:.1e}",
        ]
        for row in result["verified"]
    ]
    return markdown.table(columns, rows)


def _scan(result: dict[str, Any]) -> list[str]:
    """The increase of the loss by layer and kind, mean over seeds."""
    scans, kinds = [run["scan"] for run in result["seeds"].values()], result["plan"]["kinds"]

    def cell(layer: int, kind: str) -> str:
        keys = ("increase", "standard_error")
        mean, error = (statistics.mean(scan[key][layer][kind] for scan in scans) for key in keys)
        return f"{mean:+.4f} ({error:.4f})"

    rows = [[layer, *(cell(layer, kind) for kind in kinds)] for layer in range(result["plan"]["depth"])]
    return [
        f"Increase of the loss ({scans[0]['loss']}, {scans[0]['images']} images held out of the training images) when "
        "one layer alone is converted, mean over seeds; in brackets its standard error over the images:",
        "",
        *markdown.table(["layer", *kinds], rows),
    ]


def _budget(budget: dict[str, Any], result: dict[str, Any]) -> list[str]:
    scores = [key for key in ("top1", "loss") if key in next(iter(budget["rows"].values()))]
    headings = {"top1": "top-1", "loss": "loss"}
    rows = []
    for name, row in sorted(budget["rows"].items(), key=lambda item: item[1]["loss"]["mean"]):
        maps = dict.fromkeys(_layers(layers) for layers in row["layers"])
        cells = [name, f"{row['cost']['mean'] + result['rest']:.3f}", *(_text(row, key) for key in scores)]
        behind = f"{row['behind']['mean']:+.4f} ± {row['behind']['image_error']:.4f}"
        rows.append([*cells, behind, "; ".join(maps)])
    columns = ["map", result["unit"], *map(headings.get, scores), "loss behind the solver", "layers (by seed)"]
    return [
        f"Within {budget['cost']:.3f} {result['unit']} (softmax in every layer: {result['softmax_cost']:.3f}), "
        "test images:",
        "",
        *markdown.table(columns, rows),
    ]


@plots.styled
def picture(result: dict[str, Any]) -> Figure:
    """Quality on the test images against predicted speed-up: the solver's maps and every fixed rule's."""
    gain = "predicted speed-up" if result["unit"] == "ms" else f"{result['unit']} of softmax over those of the map"
    budgets = result["summary"]["budgets"]
    key = "top1" if budgets and "top1" in budgets[0]["rows"][SOLVER] else "loss"
    figure, axes = plots.new_axes(4.2, "Which layers to convert", gain, AXES[key])
    if not budgets:
        axes.text(0.5, 0.5, "no kind costs less than softmax here", ha="center", transform=axes.transAxes)
        return figure
    for label, points in _lines(result, key).items():
        _draw(axes, label, [(result["softmax_cost"] / cost, value) for cost, value in points], result["plan"]["kinds"])
    level = budgets[0]["rows"][SOFTMAX][key]["mean"]
    axes.axhline(level, color=plots.SOFTMAX, linewidth=1.2, label="softmax in every layer (1×)")
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.6)
    return figure


def _draw(axes: Axes, label: str, points: list[tuple[float, float]], kinds: list[str]) -> None:
    x, y = zip(*sorted(points), strict=True)
    if label == SOLVER:
        axes.plot(x, y, "o-", color=plots.T5, label=label, zorder=3)
        return
    rule, kind = label.rsplit(" ", 1)
    colour = COLOURS[kinds.index(kind) % len(COLOURS)]
    axes.plot(x, y, MARKERS[rule] + "--", color=colour, label=label, ms=4, linewidth=1)


def _lines(result: dict[str, Any], key: str) -> dict[str, list[tuple[float, float]]]:
    """(cost, value) of every map, by rule and kind."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for budget in result["summary"]["budgets"]:
        for name, row in budget["rows"].items():
            if name == SOLVER or name not in NO_RULES:
                label = re.sub(r" \d+ ", " ", name)
                lines[label].append((row["cost"]["mean"] + result["rest"], row[key]["mean"]))
    return lines


def _layers(layers: dict[str, str]) -> str:
    return ", ".join(f"{numbers}: {kind}" for numbers, kind in layers.items())


def _text(row: dict[str, Any], key: str) -> str:
    """The mean and, with several seeds, their standard deviation."""
    digits = DIGITS[key]
    return plus_minus(row[key], digits) if row["seeds"] > 1 else f"{row[key]['mean']:.{digits}f}"
