"""What tasks.studies.layer_choice found, as summary, Markdown table and picture."""

import re
import statistics
from collections import defaultdict
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from t5lib.report import plots

MARKERS = {"first": "v", "last": "^", "evenly spaced": "s", "all": "D"}
COLOURS = (plots.MUTED, plots.T5_LIGHT, plots.T5_PALE)  # of the rules, by kind
SOLVER, BY_SUM, SOFTMAX = "solver", "solver, by the sum alone", "softmax"
NO_RULES = (SOLVER, BY_SUM, SOFTMAX)


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Over seeds, for each budget: mean and spread of every map by name, and the solver beside the best fixed rule."""
    runs = [run["compared"] for run in result["seeds"].values()]
    budgets = []
    for index, budget in enumerate(result["budgets"]):
        named: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            for row in run[index]:
                named[row["name"]].append(row)
        rows = {name: _over_seeds(found) for name, found in named.items()}
        rules = {name: row for name, row in rows.items() if name not in NO_RULES}
        best = min(rules, key=lambda name: rules[name]["loss"]["mean"])
        found = {"rows": rows, "best_rule": best, "best_rule_behind": rules[best]["behind"]}
        if "top1" in rows[SOLVER]:  # in points, against the rule that is best by this measure
            top1 = max(row["top1"]["mean"] for row in rules.values())
            found["top1_ahead"] = rows[SOLVER]["top1"]["mean"] - top1
        budgets.append({**budget, **found})
    deviations = [abs(row["deviation"]) for row in result["verified"]]
    return {
        "budgets": budgets,
        "largest_deviation": max(deviations, default=None),
        "solver_no_worse": all(budget["best_rule_behind"]["mean"] >= 0 for budget in budgets) if budgets else None,
    }


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    spread = {key: _spread([row[key] for row in rows]) for key in ("loss", "top1", "cost", "behind") if key in rows[0]}
    spread["behind"]["image_error"] = statistics.mean(row["behind_error"] for row in rows)
    return spread | {"layers": [row["layers"] for row in rows], "seeds": len(rows)}


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
        plan["verdict"],
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
    lines = [
        "| layers | predicted ms | measured ms | deviation | predicted speed-up | measured speed-up | "
        "measured ms without CUDA graph | error against float64 |",
        "|---" * 8 + "|",
    ]
    softmax = result["verified"][0]
    for row in result["verified"]:
        launched = f"{row['launched_ms']:.3f}" if row["launched_ms"] else "–"
        speedups = [softmax[key] / row[key] for key in ("predicted_ms", "measured_ms")]
        cells = [
            _layers(row["layers"]),
            *(f"{row[key]:.3f}" for key in ("predicted_ms", "measured_ms")),
            f"{100 * row['deviation']:+.1f}%",
            *(f"{speedup:.2f}x" for speedup in speedups),
            launched,
            f"{row['relative_error']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _scan(result: dict[str, Any]) -> list[str]:
    """The increase of the loss by layer and kind, mean over seeds."""
    scans, kinds = [run["scan"] for run in result["seeds"].values()], result["plan"]["kinds"]
    lines = [
        f"Increase of the loss ({scans[0]['loss']}, {scans[0]['images']} images held out of the training images) when "
        "one layer alone is converted, mean over seeds; in brackets its standard error over the images:",
        "",
        "| layer | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for layer in range(result["plan"]["depth"]):
        cells = [
            f"{statistics.mean(scan['increase'][layer][kind] for scan in scans):+.4f} "
            f"({statistics.mean(scan['standard_error'][layer][kind] for scan in scans):.4f})"
            for kind in kinds
        ]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines


def _budget(budget: dict[str, Any], result: dict[str, Any]) -> list[str]:
    first = next(iter(budget["rows"].values()))
    scored = "top1" in first
    lines = [
        f"Within {budget['cost']:.3f} {result['unit']} (softmax in every layer: {result['softmax_cost']:.3f}), "
        "test images:",
        "",
        f"| map | {result['unit']} |{' top-1 |' if scored else ''} loss | loss behind the solver | layers (by seed) |",
        "|---" * (6 if scored else 5) + "|",
    ]
    for name, row in sorted(budget["rows"].items(), key=lambda item: item[1]["loss"]["mean"]):
        behind = row["behind"]
        cells = [name, f"{row['cost']['mean'] + result['rest']:.3f}"]
        cells += [_text(row, "top1", 2)] if scored else []
        cells += [_text(row, "loss", 4), f"{behind['mean']:+.4f} ± {behind['image_error']:.4f}"]
        maps = dict.fromkeys(_layers(layers) for layers in row["layers"])
        lines.append("| " + " | ".join([*cells, "; ".join(maps)]) + " |")
    return lines


def picture(result: dict[str, Any]) -> Figure:
    """Quality on the test images against predicted speed-up: the solver's maps and every fixed rule's."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
        gain = "predicted speed-up" if result["unit"] == "ms" else f"{result['unit']} of softmax over those of the map"
        axes = figure.add_subplot(title="Which layers to convert", xlabel=gain)
        budgets, kinds = result["summary"]["budgets"], result["plan"]["kinds"]
        key = "top1" if budgets and "top1" in budgets[0]["rows"][SOLVER] else "loss"
        axes.set_ylabel("top-1 accuracy (%)" if key == "top1" else "loss")
        for label, points in _lines(result, key).items():
            x, y = zip(*sorted((result["softmax_cost"] / cost, value) for cost, value in points), strict=True)
            if label == SOLVER:
                axes.plot(x, y, "o-", color=plots.T5, label=label, zorder=3)
                continue
            rule, kind = label.rsplit(" ", 1)
            colour = COLOURS[kinds.index(kind) % len(COLOURS)]
            axes.plot(x, y, MARKERS[rule] + "--", color=colour, label=label, ms=4, linewidth=1)
        if budgets:
            level = budgets[0]["rows"][SOFTMAX][key]["mean"]
            axes.axhline(level, color=plots.SOFTMAX, linewidth=1.2, label="softmax in every layer (1×)")
            figure.legend(loc="outside lower center", ncols=2, handlelength=1.6)
        else:
            axes.text(0.5, 0.5, "no kind costs less than softmax here", ha="center", transform=axes.transAxes)
    return figure


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


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _text(row: dict[str, Any], key: str, digits: int) -> str:
    """The mean and, with several seeds, their standard deviation."""
    spread = f" ± {row[key]['std']:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{row[key]['mean']:.{digits}f}{spread}"
