"""Run a target's stages for several seeds, without DVC, and write a table of means and spreads.

    python -m tasks.studies.seeds dinov2-fashion-24k --seeds 0 1 2 --out docs/results/dinov2-fashion-24k

writes OUT.json (every seed's figures, the settings, the device), OUT.md and OUT.png, for any kind of target. Every seed
sets all the target's seeds: head, source, new weights, calibration, order of images, training. Finished seeds are not
run again.
"""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from t5lib.evaluation.level import upper_bound
from t5lib.report import plots
from t5lib.report.models import MODELS
from t5lib.report.score_table import METRICS
from t5lib.utils import markdown
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.runtime import command_line
from tasks.studies import common
from tasks.studies.common import plus_minus, spread, with_seed, workspace
from tasks.targets import resolve
from tasks.targets.run import run_stage

LAST = "evaluate"  # the stage up to which every seed is run
# What is shown of a model, where it has it: name of the score, heading, whether less is better, digits.
SCORES = {
    "top1": ("top-1 (%)", "higher", 2),
    "top5": ("top-5 (%)", "higher", 2),
    "agreement": ("agreement with source (%)", "higher", 2),
} | METRICS
DRAWN = ("top1", "fid", "fd_dinov2", "retrieval_r1")  # the scores that the picture shows
# Differences that matter, taken seed by seed.
GAPS = (("finetuned", "control"), ("calibrated", "source"), ("aligned", "source"))


@dataclass(frozen=True)
class Job:
    """One seed: `settings` are the target's with that seed, `root` is the folder that its stages work in."""

    target: str
    seed: int
    settings: dict[str, Any]
    root: Path


def run(
    target: str, settings: dict[str, Any], seeds: list[int], out: Path, work: Path, at_once: int = 1
) -> dict[str, Any]:
    """Run every seed in `work`/seed-N and write the summary of all to `out`.json, .md and .png.

    Args:
        settings: of the target, resolved.
        at_once: seeds, each in a process of its own.

    Raises:
        T5Error: a seed that broke, after the others were done.
    """
    jobs = [Job(target, seed, with_seed(settings, seed), work / f"seed-{seed}") for seed in seeds]
    outcomes = list(common.run_jobs(run_seed, jobs, at_once))
    problems = [f"seed {outcome.job.seed} failed: {outcome.problem}" for outcome in outcomes if outcome.problem]
    if problems:
        raise T5Error("\n".join(problems))
    runs = {outcome.job.seed: outcome.result for outcome in outcomes if outcome.result is not None}
    result = {
        "target": target,
        "device": runs[seeds[0]]["device"],
        "torch": runs[seeds[0]]["torch"],
        "settings": settings,
        "seeds": {str(seed): runs[seed] for seed in seeds},
        "summary": summarize([runs[seed] for seed in seeds]),
    }
    write_json(out.with_suffix(".json"), result)
    markdown.write_page(out.with_suffix(".md"), table(result))
    plots.save(picture(result["summary"]["scores"]), out.with_suffix(".png"))
    return result


def run_seed(job: Job) -> dict[str, Any]:
    """Every stage of the target with one seed, or what is kept of them; the models' scores, and what the stages say."""
    done = job.root / "result.json"
    if done.is_file() and (known := read_json(done))["settings"] == job.settings:
        return known
    metrics = {}
    for stage in common.stages_of(Path("."), LAST):
        print(f"== {job.root.name}: {stage}", flush=True)
        metrics[stage] = run_stage(stage, job.target, params=job.settings, root=workspace(job.root))
        common.clean_up()
    models = metrics.pop(LAST)["models"]
    result = {"models": models, "stages": metrics, **common.machine(), "settings": job.settings}
    write_json(done, result)
    return result


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds: of every model's scores, of the gaps, and of the stages' seconds."""
    scores = [{name: _numbers(score) for name, score in run["models"].items()} for run in runs]
    summary: dict[str, Any] = {"scores": {name: _spreads([each[name] for each in scores]) for name in scores[0]}}
    for ours, theirs in _gaps(scores[0]):
        gaps = [
            {metric: each[ours][metric] - each[theirs][metric] for metric in each[ours] if metric in each[theirs]}
            for each in scores
        ]
        summary[f"{ours}_minus_{theirs}"] = _spreads(gaps)
    seconds = [
        {stage: metrics["seconds"] for stage, metrics in run["stages"].items() if "seconds" in metrics} for run in runs
    ]
    return summary | {"seconds": _spreads(seconds)}


def _gaps(scores: Collection[str]) -> list[tuple[str, str]]:
    """Those of GAPS whose models have scores."""
    return [gap for gap in GAPS if all(model in scores for model in gap)]


def _numbers(score: dict[str, Any]) -> dict[str, float]:
    """Those of SCORES that a model has."""
    return {metric: score[metric] for metric in SCORES if score.get(metric) is not None}


def _spreads(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """By name, over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: spread([run[name] for run in runs if name in run]) for name in names}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a row a model, a column a score; then the foremost score and its gaps seed by seed."""
    summary, runs = result["summary"], result["seeds"]
    scores = summary["scores"]
    metrics = [metric for metric in SCORES if any(metric in score for score in scores.values())]
    rows = [[name, *_cells(score, metrics)] for name, score in scores.items()]
    rows += [
        [f"{ours} − {theirs}", *_cells(summary[f"{ours}_minus_{theirs}"], metrics)] for ours, theirs in _gaps(scores)
    ]
    main = next(metric for metric in DRAWN if metric in metrics)
    seconds = [f"{stage} {plus_minus(value, 0)}" for stage, value in summary["seconds"].items()]
    measured = common.measured_on(next(iter(runs.values()))["models"])
    lines = [
        f"# {result['target']}",
        "",
        f"Seeds {', '.join(runs)}; mean ± standard deviation. {measured}.",
        f"Device: {result['device']}, torch {result['torch']}. An arrow says which way is better.",
        "",
        *markdown.table(["model", *(common.heading(SCORES[metric]) for metric in metrics)], rows, numbers=True),
        "",
        *_by_seed(runs, main),
        *_gaps_by_seed(runs, main),
        f"Seconds: {', '.join(seconds)}.",
        "",
    ]
    return "\n".join(lines)


def _by_seed(runs: dict[str, dict[str, Any]], metric: str) -> list[str]:
    """The models' scores in every run."""
    heading, _, digits = SCORES[metric]
    rows = [[name, *(f"{value:.{digits}f}" for value in values)] for name, values in _values(runs, metric).items()]
    header = ["model", *(f"seed {seed}" for seed in runs)]
    return [f"{heading} of every seed:", "", *markdown.table(header, rows, numbers=True), ""]


def _gaps_by_seed(runs: dict[str, dict[str, Any]], metric: str) -> list[str]:
    """Whether models are level: the differences in every run, their mean, and how bad it may be."""
    heading, better, digits = SCORES[metric]
    values, rows = _values(runs, metric), []
    for ours, theirs in _gaps(values):
        over = [mine - its for mine, its in zip(values[ours], values[theirs], strict=True)]
        shown = [*over, statistics.mean(over), _at_worst(over, better)]
        cells = [None if value is None else f"{value:+.{digits}f}" for value in shown]
        rows.append([f"{ours} − {theirs}", *cells])
    if not rows:
        return []
    said = (
        f"Differences in {heading}. The last column is the one-sided bound of 95 % of the mean over seeds, on the side "
        "where the first model is worse."
    )
    header = ["difference", *(f"seed {seed}" for seed in runs), "mean", "at worst"]
    return [said, "", *markdown.table(header, rows, numbers=True), ""]


def _values(runs: dict[str, dict[str, Any]], metric: str) -> dict[str, list[float]]:
    """By model, its score in every run; without the models that have none."""
    models = [run["models"] for run in runs.values()]
    names = [name for name, score in models[0].items() if score.get(metric) is not None]
    return {name: [run[name][metric] for run in models] for name in names}


def _at_worst(differences: Sequence[float], better: str) -> float | None:
    """The bound of their mean on the side that is worse; None for a single one."""
    if better == "lower":
        return upper_bound(differences)
    bound = upper_bound([-value for value in differences])
    return None if bound is None else -bound


def _cells(score: dict[str, dict[str, float]], metrics: list[str]) -> list[str | None]:
    return [plus_minus(score[metric], SCORES[metric][2]) if metric in score else None for metric in metrics]


@plots.styled
def picture(scores: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """A panel a score: every model's mean over the seeds; the whisker is the standard deviation."""
    models = [model for model in MODELS if model.key in scores]
    drawn = [metric for metric in DRAWN if any(metric in scores[model.key] for model in models)]
    figure = Figure(figsize=(plots.WIDTH, (0.8 + 0.26 * len(models)) * len(drawn)), layout="constrained")
    for axes, metric in zip(figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        for row, model in enumerate(models):
            value = scores[model.key][metric]
            axes.errorbar(value["mean"], row, xerr=value["std"], fmt="o", color=model.colour, capsize=3)
            text = f"{value['mean']:.{SCORES[metric][2]}f}"
            axes.annotate(text, (value["mean"], row), (0, 5), textcoords="offset points", ha="center", fontsize=8)
        name, better, _ = SCORES[metric]
        axes.set_title(f"{name} ({better} is better)")
        axes.set_yticks(range(len(models)), [model.label.lower() for model in models], color=plots.INK)
        axes.set_ylim(len(models) - 0.5, -0.9)
        axes.margins(x=0.12)
        axes.spines["left"].set_visible(False)
        if common.needs_logarithm(axes.dataLim.intervalx, better):
            axes.set_xscale("log")
            plots.plain_log_ticks(axes.xaxis)
    return figure


def main() -> None:
    parser = common.parser("seeds", __doc__)
    command_line.add_target(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; each is a run of all stages")
    parser.add_argument("--out", type=Path, required=True, help="path of the .json, .md and .png, with no file ending")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/seeds"), help="where partial work is kept")
    common.add_jobs(parser)
    common.add_changes(parser)
    arguments = parser.parse_args()
    with common.reported("seeds"):
        settings = resolve(Path("."), arguments.target, arguments.set)
        work = arguments.work / arguments.target
        result = run(arguments.target, settings, arguments.seeds, arguments.out, work, arguments.jobs)
        print(table(result))


if __name__ == "__main__":
    main()
