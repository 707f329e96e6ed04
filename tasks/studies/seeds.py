"""Run a target's stages for several seeds in one process, without DVC, and write a table of means and spreads.

    python -m tasks.studies.seeds dinov2-fashion-24k --seeds 0 1 2 --out docs/results/dinov2-fashion-24k

writes OUT.json (every seed's figures, the settings, the device), OUT.md and OUT.png. Every seed sets all the target's
seeds: head, source, new weights, calibration, order of images, training. Finished seeds are not run again.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from t5lib.benchmarks.resolution_sweep import describe_device
from t5lib.report import common, plots
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json, write_text
from tasks.evaluate import MODELS
from tasks.runtime.params import resolve
from tasks.runtime.stage import run_stage
from tasks.targets.classifier import device

STAGES = ("fetch", "shards", "source", "diagnose", "convert", "calibrate", "freeze", "finetune", "control", "evaluate")
MADE = ("out", "scratch", "mlflow", "prefect", "cache")  # folders of data/ that runs fill
TIMED = ("source", "calibrate", "freeze", "finetune", "control")


def compare(target: str, seeds: list[int], out: Path, work: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Run every seed in `work`/seed-N and write the summary of all to `out`.json, .md and .png."""
    settings = resolve(Path("."), target)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    runs = {seed: _one_seed(target, with_seed(settings, seed), work / f"seed-{seed}") for seed in seeds}
    result = {
        "target": target,
        "device": next(iter(runs.values()))["device"],
        "torch": next(iter(runs.values()))["torch"],
        "settings": settings,
        "seeds": {str(seed): run for seed, run in runs.items()},
        "summary": summarize(list(runs.values())),
    }
    write_json(out.with_suffix(".json"), result)
    write_text(out.with_suffix(".md"), table(result))
    plots.save(picture(result["summary"]["top1"]), out.with_suffix(".png"))
    return result


def picture(top1: dict[str, dict[str, float]]) -> Figure:
    """Bars of mean top-1 over the seeds; the whisker is their standard deviation."""
    looks = {model.key: model for model in common.MODELS}
    bars = [
        {"label": looks[name].label.lower(), "colour": looks[name].colour, "top1": s["mean"], "error": s["std"]}
        for name, s in top1.items()
    ]
    return plots.quality_bars(bars)


def with_seed(settings: Any, seed: int) -> Any:
    """`settings` with the value of every key named "seed" replaced."""
    if not isinstance(settings, dict):
        return settings
    return {key: seed if key == "seed" else with_seed(value, seed) for key, value in settings.items()}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of top-1 and agreement, and of the two gaps that matter, in points."""
    top1 = {name: [run["models"][name]["top1"] for run in runs] for name in MODELS}
    return {
        "top1": {name: spread(values) for name, values in top1.items()},
        "agreement": {name: spread([run["models"][name]["agreement"] for run in runs]) for name in MODELS},
        "finetuned_minus_control": spread([a - b for a, b in zip(top1["finetuned"], top1["control"], strict=True)]),
        "calibrated_minus_source": spread([a - b for a, b in zip(top1["calibrated"], top1["source"], strict=True)]),
        "seconds": {stage: spread([run["seconds"][stage] for run in runs]) for stage in TIMED},
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    summary, seeds = result["summary"], list(result["seeds"])
    n = next(iter(result["seeds"].values()))["models"]["source"]["n"]
    lines = [
        f"# {result['target']}",
        "",
        f"Top-1 in percent of {n:,} validation images, seeds {', '.join(seeds)}; mean ± standard deviation.",
        f"Device: {result['device']}, torch {result['torch']}.",
        "",
        "| model | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | agreement with source |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for name in MODELS:
        values = [f"{run['models'][name]['top1']:.2f}" for run in result["seeds"].values()]
        means = [plus_minus(summary[key][name]) for key in ("top1", "agreement")]
        lines.append(f"| {name} | " + " | ".join(values + means) + " |")
    lines += [
        "",
        f"Fine-tuned T5 minus control: {plus_minus(summary['finetuned_minus_control'])} points.",
        f"Calibrated (no labels, no fine-tune) minus source: {plus_minus(summary['calibrated_minus_source'])} points.",
        "Seconds: " + ", ".join(f"{stage} {plus_minus(summary['seconds'][stage], 0)}" for stage in TIMED) + ".",
        "",
    ]
    return "\n".join(lines)


def _one_seed(target: str, settings: dict[str, Any], root: Path) -> dict[str, Any]:
    done = root / "result.json"
    if done.is_file() and read_json(done)["settings"] == settings:
        return read_json(done)
    metrics = {}
    for stage in STAGES:
        print(f"== {root.name}: {stage}", flush=True)
        metrics[stage] = run_stage(stage, target, params=settings, root=workspace(root))
        torch.compiler.reset()  # every stage compiles new modules; without this torch soon gives up and runs eager
    result = {
        "models": metrics["evaluate"]["models"],
        "seconds": {stage: metrics[stage]["seconds"] for stage in TIMED},
        "calibration_error": {key: value for key, value in metrics["calibrate"].items() if key.startswith("error")},
        "shift_ratio": metrics["diagnose"],
        "device": describe_device(device()),
        "torch": torch.__version__,
        "settings": settings,
    }
    write_json(done, result)
    return result


def workspace(root: Path) -> Path:
    """A folder that looks like the repository to a stage: its own outputs, the repository's images and models."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    for folder in Path("data").glob("*"):
        link = root / "data" / folder.name
        if folder.is_dir() and folder.name not in MADE and not link.exists():
            link.symlink_to(folder.resolve())
    return root


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def plus_minus(spread: dict[str, float], digits: int = 2) -> str:
    return f"{spread['mean']:.{digits}f} ± {spread['std']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="where the .json and .md go, without ending")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/compare"))
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="settings to replace")
    arguments = parser.parse_args()
    changes = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    try:
        result = compare(arguments.target, arguments.seeds, arguments.out, arguments.work / arguments.target, changes)
    except T5Error as error:
        sys.exit(f"compare: {error}")
    print(table(result))


if __name__ == "__main__":
    main()
