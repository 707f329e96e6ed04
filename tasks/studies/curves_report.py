"""The result of tasks.studies.curves as Markdown table and picture."""

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t5lib.evaluation.level import upper_bound
from t5lib.report import plots
from t5lib.report.score_table import METRICS
from t5lib.utils import markdown
from tasks.studies import common
from tasks.studies.common import plus_minus, spread

CONTROL, PLAIN = "control", ", not calibrated"  # an arm, and what others' names end with
CURVES = ("loss", "fd_dinov2", "fid", "retrieval_r1")  # the scores that are drawn, where there are any
REFERENCES = (("real images", "real"), ("source", "source"))  # the first rows of the table, and where they stand


def at(arm: dict[str, Any], steps: int, metric: str) -> dict[str, float] | None:
    """Mean and deviation over the seeds of one arm's score after `steps`; None where it has none."""
    points = [point for run in arm.values() for point in run["points"] if point["steps"] == steps and metric in point]
    return spread([point[metric] for point in points]) if points else None


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a row a model, a column a score."""
    arms = result["arms"]
    metrics = [name for name in METRICS if any(name in point for point in points_of(arms))]
    rows = [[name, *(_plain(result[key].get(metric), metric) for metric in metrics), ""] for name, key in REFERENCES]
    for name, arm in arms.items():
        own = {point["steps"] for point in points_of({name: arm})}
        for steps in sorted(own if name == CONTROL else own & {0, max(own)}):
            if name == CONTROL and not steps:
                continue  # that is the source
            cells = [_mean(at(arm, steps, metric), METRICS[metric][2]) for metric in metrics]
            rows.append([f"{name}, {steps:,} steps", *cells, _mean(at(arm, steps, "seconds_in_all"), 0)])
    lines = [
        f"# {result['target']}",
        "",
        f"Seeds {', '.join(sorted({seed for arm in arms.values() for seed in arm}))}; mean ± standard deviation. "
        f"{common.measured_on({'source': result['source']})}. Device: {result['device']}, torch {result['torch']}. An "
        "arrow says which way is better. Seconds are those of all stages that made a model.",
        "",
        *markdown.table(["model", *(common.heading(METRICS[metric]) for metric in metrics), "seconds"], rows),
    ]
    return "\n".join([*lines, "", *_beside_control(arms)])


def _beside_control(arms: dict[str, Any]) -> list[str]:
    """How much farther from real images an arm ends than the control does, each after its longest training."""
    rows = []
    for name, arm in arms.items():
        for metric in ("fd_dinov2", "fid"):
            over = _over_control(arm, arms.get(CONTROL, {}), metric) if name != CONTROL else []
            if over:
                bound = upper_bound(over)
                by_seed = ", ".join(f"{value:+.1f}" for value in over)
                at_most = "" if bound is None else f"{bound:+.1f}"
                rows.append([name, METRICS[metric][0], f"{statistics.mean(over):+.1f}", by_seed, at_most])
    if not rows:
        return []
    header = ["model", "score", "over the control's, %", "by seed", "at most, %"]
    said = "The last column is the upper one-sided bound of 95 % of the mean over seeds."
    return [said, "", *markdown.table(header, rows), ""]


def _over_control(arm: dict[str, Any], control: dict[str, Any], metric: str) -> list[float]:
    """In percent of the control's score with the same seed; none where a score is missing."""
    ends = [(arm[seed]["points"][-1], control[seed]["points"][-1]) for seed in arm if seed in control]
    return [100 * (mine[metric] / its[metric] - 1) for mine, its in ends if metric in mine and metric in its]


def points_of(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Every point of every seed."""
    return [point for arm in arms.values() for run in arm.values() for point in run["points"]]


def _plain(value: float | None, metric: str) -> str:
    return "" if value is None else f"{value:.{METRICS[metric][2]}f}"


def _mean(value: dict[str, float] | None, digits: int) -> str:
    return plus_minus(value, digits) if value else ""


@plots.styled
def picture(result: dict[str, Any]) -> Figure:
    """A panel a score: means over the seeds with their standard deviation; the source as a dotted line."""
    arms, points = result["arms"], points_of(result["arms"])
    steps = sorted({point["steps"] for point in points})
    shown = [name for name in CURVES if any(name in point for point in points)]
    figure = Figure(figsize=(plots.WIDTH, 2.3 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, metric in zip(panels, shown, strict=True):
        for name, arm in arms.items():
            _draw(axes, {number: value for number in steps if (value := at(arm, number, metric))}, name, list(arms))
        axes.axhline(result["source"][metric], color=plots.MUTED, linewidth=0.9, linestyle=":")
        axes.set_title(f"{METRICS[metric][0]} ({METRICS[metric][1]} is better)")
        axes.set_xscale("symlog", linthresh=max(1, steps[1] if len(steps) > 1 else 1))
        axes.set_xticks(steps, [f"{number:,}" for number in steps])
        if common.needs_logarithm(axes.dataLim.intervaly, METRICS[metric][1]):
            axes.set_yscale("log")
            plots.plain_log_ticks(axes.yaxis)
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=3.5)
    panels[-1].set_xlabel("fine-tune steps (dotted: the source)")
    return figure


def _draw(axes: Axes, values: dict[int, dict[str, float]], name: str, arms: list[str]) -> None:
    """One arm's line; blue is softmax, colour and marker stand for a model, dashes for no calibration."""
    models = list(dict.fromkeys(arm.removesuffix(PLAIN) for arm in arms if arm != CONTROL))
    colours, markers = (plots.T5, plots.T5_LIGHT, plots.T5_PALE), "os^Dv*"
    place = 0 if name == CONTROL else models.index(name.removesuffix(PLAIN))
    means, errors = ([value[key] for value in values.values()] for key in ("mean", "std"))
    axes.errorbar(
        list(values),
        means,
        yerr=errors,
        label=name,
        color=plots.SOFTMAX if name == CONTROL else colours[place % len(colours)],
        linestyle="--" if name.endswith(PLAIN) else "-",
        marker=markers[place // len(colours) % len(markers)],
        markersize=3.5,
        capsize=2,
    )
