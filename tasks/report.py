"""report: one HTML page and a Markdown summary of everything the other stages found, and the headline in figures."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from t5lib.benchmarks.timing import describe_device
from t5lib.report import page
from t5lib.report.data import REQUIRED, ReportData
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_text
from tasks.runtime.stage import Stage, read_history
from tasks.runtime.tracking.about import git_commit
from tasks.targets import resolve
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("data",)
OPTIONAL = ("source", "diagnose", "align", "freeze", "control", "explain", "benchmark")
SPEED = ("speedup_at_largest", "break_even_tokens")  # of benchmark's figures, those in the headline
CURVES = ("calibrate", "align", "freeze", "finetune", "control")


def run(target: Target) -> dict[str, Any]:
    """Write report.html, summary.md and the training curves; return the headline: a score of every model, and speed."""
    stage, data = target.stage, gather(target)
    quality, speed = target.quality(data), data.metrics.get("benchmark", {})
    write_text(stage.out / "report.html", page.html(data, quality))
    write_text(stage.out / "summary.md", page.summary(data, quality))
    for name in ("report.html", "summary.md"):
        stage.artifact(stage.out / name)
    write_curves(stage.out / "curves", data.histories)
    return {**quality.headline, **{name: speed[name] for name in SPEED if name in speed}}


def write_curves(folder: Path, histories: dict[str, list[dict[str, float]]]) -> None:
    """A CSV file with step and loss for every stage that trained: what `dvc plots` draws."""
    folder.mkdir()
    for name, points in histories.items():
        lines = [f"{point['step']},{point['loss']}\n" for point in points if "loss" in point]
        write_text(folder / f"{name}.csv", "".join(["step,loss\n", *lines]))


def gather(target: Target) -> ReportData:
    """Read what the stages of the target wrote.

    Raises:
        T5Error: one that the report cannot do without is absent.
    """
    stage, samples = target.stage, target.samples()
    metrics = {name: stage.metrics(name) for name in REQUIRED}
    metrics |= {name: made for name in OPTIONAL if (made := _if_made(stage.metrics, name)) is not None}
    curves = {name: stage.input(name) / "history.jsonl" for name in CURVES if name in metrics}
    benchmark = read_json(stage.input("benchmark") / "benchmark.json") if "benchmark" in metrics else None
    explained = stage.input("explain") if "explain" in metrics else None
    return ReportData(
        target=stage.target,
        metrics=metrics,
        histories={name: read_history(path) for name, path in curves.items() if path.is_file()},
        account=read_json(stage.input("convert") / "account.json"),
        description=read_json(stage.input("finetune") / "t5.json"),
        samples=samples.read_bytes() if samples else None,
        shift=read_json(stage.input("diagnose") / "shift_ratio.json") if "diagnose" in metrics else None,
        explanation=read_json(explained / "explanation.json") if explained else None,
        maps=tuple(path.read_bytes() for path in sorted(explained.glob("maps-*.png"))) if explained else (),
        benchmark=benchmark,
        parameters=resolve(stage.root, stage.target) if (stage.root / "params.yaml").is_file() else {},
        provenance=_provenance(stage, benchmark),
    )


def _if_made(read, name: str) -> Any | None:
    try:
        return read(name)
    except T5Error:
        return None


def _provenance(stage: Stage, benchmark: dict[str, Any] | None) -> dict[str, str]:
    return {
        "Git commit": git_commit(stage.root),
        "Made on": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "Device": benchmark["device"] if benchmark else describe_device("cpu"),
        "Python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "timm", "t5-ttt")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # ours, run from its folder
        return "not installed"


if __name__ == "__main__":
    main(run)
