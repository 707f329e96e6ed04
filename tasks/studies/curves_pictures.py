"""The pictures of tasks.studies.curves: scores against fine-tune steps, and samples of every arm."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from t5lib.evaluation.generation import read_images
from t5lib.report import plots
from t5lib.report.sample_grid import sample_grid
from t5lib.report.score_table import METRICS
from tasks.studies.curves import CONTROL, Job, at

SHOWN = 6  # rows of samples
LOGARITHMIC = 5  # a score whose largest value is so many times its smallest


@plots.styled
def curves_of(result: dict[str, Any], metrics: tuple[str, ...]) -> Figure:
    """A panel a score: means over the seeds with their standard deviation; the source as a dotted line."""
    arms = result["arms"]
    points = [point for arm in arms.values() for run in arm.values() for point in run["points"]]
    steps = sorted({point["steps"] for point in points})
    shown = [name for name in metrics if any(name in point for point in points)]
    figure = Figure(figsize=(plots.WIDTH, 2.3 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, metric in zip(panels, shown, strict=True):
        for name, arm in arms.items():
            _draw(axes, [(number, at(arm, number, metric)) for number in steps], name, list(arms))
        axes.axhline(result["source"][metric], color=plots.MUTED, linewidth=0.9, linestyle=":")
        axes.set_title(f"{METRICS[metric][0]} ({METRICS[metric][1]} is better)")
        axes.set_xscale("symlog", linthresh=max(1, steps[1] if len(steps) > 1 else 1))
        axes.set_xticks(steps, [f"{number:,}" for number in steps])
        low, high = axes.dataLim.intervaly
        if METRICS[metric][1] == "lower" and high > LOGARITHMIC * low > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=3.5)
    panels[-1].set_xlabel("fine-tune steps (dotted: the source)")
    return figure


def _draw(axes: Axes, points: list[tuple[int, dict[str, float] | None]], name: str, arms: list[str]) -> None:
    found = [(steps, value) for steps, value in points if value]
    colour, line = _look(name, arms)
    axes.errorbar(
        [steps for steps, _ in found],
        [value["mean"] for _, value in found],
        yerr=[value["std"] for _, value in found],
        label=name,
        color=colour,
        linestyle=line,
        marker="o",
        markersize=3.5,
        capsize=2,
    )


def _look(name: str, arms: list[str]) -> tuple[str, str]:
    """Colour and line: blue is softmax, a colour a layer set, dashes without calibration."""
    if name == CONTROL:
        return plots.SOFTMAX, "-"
    sets = list(dict.fromkeys(arm.partition(", ")[0] for arm in arms if arm != CONTROL))
    colours = (plots.T5, plots.T5_LIGHT, plots.T5_PALE)
    return colours[sets.index(name.partition(", ")[0]) % len(colours)], "--" if ", " in name else "-"


def samples_of(jobs: list[Job]) -> Figure:
    """Rows of prompts, a column for the source and one for every arm after its longest fine-tune (which its title
    tells), of one seed: that of the first arm that has any."""
    found = [(job, result) for job in jobs if (result := job.found())]
    (first, told), *_ = found
    prompts, shared = told["prompts"], first.shared / "images"
    rows = range(0, len(prompts), max(1, len(prompts) // SHOWN))[:SHOWN]
    names = [f"{row:05}.png" for row in rows]
    pictures = {"source": read_images([shared / name for name in names])}
    for job, result in found:
        if job.seed == first.seed:
            steps = result["points"][-1]["steps"]
            folder = job.root / f"images/{steps}"
            pictures[f"{job.arm.name}, {steps:,} steps"] = read_images([folder / name for name in names])
    return sample_grid(pictures, [prompts[row] for row in rows])
