"""Quality of a denoiser against fine-tune steps: layer sets, calibrated or not, beside the softmax control.

    python -m tasks.curves sd35-micro --layers paper all --steps 0 100 400 --seeds 0 1 --out docs/results/sd35-micro

Every point is a training of its own with the target's recipe over so many steps, from the calibrated (or merely
converted) model; the control is the softmax source under the same recipe. Writes OUT.json (every figure of every seed,
settings, device), OUT.md, OUT.png (curves) and OUT-samples.png. Finished arms are not run again; --jobs shares a card.
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t5lib.config import from_dict
from t5lib.errors import T5Error
from t5lib.files import read_json, write_json, write_text
from tasks.compare import plus_minus, spread, with_seed, workspace
from tasks.params import kind, resolve
from tasks.stage import run_stage

SHARED = ("fetch", "shards", "source")  # stages that are the same for all arms and seeds
CONTROL = "control"
CURVES = ("loss", "fd_dinov2", "fid", "retrieval_r1")  # the scores that are drawn, where there are any


@dataclass(frozen=True)
class Arm:
    """One line of the picture: a layer set (None: softmax), with attention transfer or without."""

    layers: str | None
    calibrated: bool

    @property
    def name(self) -> str:
        return CONTROL if self.layers is None else self.layers + ("" if self.calibrated else ", not calibrated")


@dataclass(frozen=True)
class Job:
    """An arm and a seed: what one process does. `settings` are the target's, resolved."""

    target: str
    arm: Arm
    seed: int
    steps: tuple[int, ...]
    settings: dict[str, Any]
    work: Path

    @property
    def root(self) -> Path:
        return self.work / f"{self.arm.name.replace(', ', '-').replace(' ', '-')}--seed-{self.seed}"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    def done(self) -> bool:
        asked = {"settings": self.settings, "steps": list(self.steps), "seed": self.seed}
        return self.result.is_file() and asked.items() <= read_json(self.result).items()


def run(
    target: str,
    settings: dict[str, Any],
    layers: list[str],
    steps: list[int],
    seeds: list[int],
    out: Path,
    work: Path,
    jobs: int,
) -> dict[str, Any]:
    """Run what is not done yet, and write the summary of what is.

    Args:
        settings: of the target, resolved.
        layers: layer sets, as convert.layers takes them; steps: of the fine-tunes, 0 for none; jobs: processes.

    Raises:
        T5Error: a target that is no denoiser, or an arm that broke (after the others were done).
    """
    if kind(settings) != "denoiser":
        raise T5Error(f"'{target}' is a classifier; `python -m tasks.compare` and `tasks.ablate` are for those")
    arms = [Arm(None, False), *(Arm(each, calibrated) for each in layers for calibrated in (True, False))]
    planned = [
        Job(target, arm, seed, tuple(sorted(set(steps))), _of_arm(settings, arm, seed), work)
        for seed in seeds
        for arm in arms
    ]
    _make_shared(target, settings, work / "shared")
    problems = _do([job for job in planned if not job.done()], jobs)
    finished = [job for job in planned if job.done()]
    if finished:
        _write(target, settings, finished, out)
    if problems:
        raise T5Error(f"{len(problems)} of {len(planned)} arms broke: {'; '.join(problems)}")
    return read_json(out.with_suffix(".json"))


def _of_arm(settings: dict[str, Any], arm: Arm, seed: int) -> dict[str, Any]:
    own = with_seed(settings, seed)
    if arm.layers is not None:
        own["convert"] = own["convert"] | {"layers": arm.layers}
    if not arm.calibrated:
        own["calibrate"] = own["calibrate"] | {"steps": 0}
    return own


def _make_shared(target: str, settings: dict[str, Any], root: Path) -> None:
    """Fetch, encode and take the source once."""
    sections = {name: settings[name] for name in (*SHARED, "data")}
    note = root / "made.json"
    if note.is_file() and read_json(note) == sections:
        return
    for name in SHARED:
        run_stage(name, target, params=settings, root=workspace(root))
    write_json(note, sections)


def _do(jobs: list[Job], at_once: int) -> list[str]:
    """Do the jobs; what broke, by name."""
    if at_once == 1:
        return [problem for job in jobs if (problem := attempt(job))]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))  # torch reads it at start
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(at_once, mp_context=context) as pool:
        return [
            problem for each in as_completed(pool.submit(attempt, job) for job in jobs) if (problem := each.result())
        ]


def attempt(job: Job) -> str | None:
    """Do one; what broke, or None."""
    try:
        _points(job)
        print(f"{job.arm.name}, seed {job.seed}: done", flush=True)
    except Exception as error:
        print(f"{job.arm.name}, seed {job.seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return f"{job.arm.name}, seed {job.seed}: {error}"
    return None


def _points(job: Job) -> None:
    """Convert, calibrate, then train and score once for every number of steps."""
    import torch

    from t5lib.benchmark import describe_device
    from tasks.common import device

    out = workspace(job.root) / f"data/out/{job.target}"
    _link(job, out)
    stages = {} if job.arm.layers is None else {name: _stage(job, name) for name in ("convert", "calibrate")}
    start, training = ("source", "control") if job.arm.layers is None else ("calibrate", "finetune")
    judge, points = _judge(job, out), []
    drawn = {"source": judge.draw("source", out / "source", job.work / "shared/images")}
    for steps in job.steps:
        metrics, model = {"seconds": 0.0}, out / start
        if steps:
            metrics, model = (
                _stage(job, training, finetune={**job.settings["finetune"], "steps": steps}),
                out / training,
            )
            torch.compiler.reset()  # every training compiles new modules
        drawn["model"] = judge.draw(job.arm.name, model, job.root / f"images/{steps}")
        found = judge.scores(drawn)
        points.append({"steps": steps, "seconds": metrics["seconds"], **found["model"]})
    result = {"arm": job.arm.name, "seed": job.seed, "steps": list(job.steps), "settings": job.settings}
    result |= {
        "stages": stages,
        "points": points,
        "source": found["source"],
        "real": found["real images"],
        "prompts": judge.prompts,
    }
    write_json(job.result, result | {"device": describe_device(device()), "torch": torch.__version__})


def _stage(job: Job, name: str, **changes: Any) -> dict[str, Any]:
    return run_stage(name, job.target, params=job.settings | changes, root=job.root)


def _link(job: Job, out: Path) -> None:
    """What all arms share, as if it had been made here."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if not (out / name).exists():
            (out / name).symlink_to((job.work / f"shared/data/out/{job.target}/{name}").resolve())


def _judge(job: Job, out: Path) -> Any:
    from tasks.denoisers.data import LatentsConfig
    from tasks.denoisers.judge import EvaluateConfig, Judge

    config, data = (
        from_dict(cls, job.settings[name], name)
        for cls, name in ((EvaluateConfig, "evaluate"), (LatentsConfig, "data"))
    )
    made = {"fetched": out / "fetch", "shards": out / "shards", "source": out / "source"}
    return Judge(config, data, **made, root=job.root)


def _write(target: str, settings: dict[str, Any], finished: list[Job], out: Path) -> None:
    from t5lib import plots
    from tasks.curves_pictures import curves_of, samples_of

    runs = [read_json(job.result) for job in finished]
    shown = {key: value for key, value in settings.items() if key not in ("explain", "benchmark", "diagnose", "freeze")}
    arms: dict[str, dict[str, Any]] = {}
    for each in runs:
        arms.setdefault(each["arm"], {})[str(each["seed"])] = {key: each[key] for key in ("stages", "points")}
    result = {"target": target, "device": runs[0]["device"], "torch": runs[0]["torch"], "settings": shown}
    result |= {"source": runs[0]["source"], "real": runs[0]["real"], "arms": arms}
    write_json(out.with_suffix(".json"), result)
    write_text(out.with_suffix(".md"), table(result))
    plots.save(curves_of(result, CURVES), out.with_suffix(".png"))
    plots.save(samples_of(finished), out.with_name(f"{out.stem}-samples.png"))


def at(arm: dict[str, Any], steps: int, metric: str) -> dict[str, float] | None:
    """Mean and deviation over the seeds of one arm's score after `steps`; None where it has none."""
    points = [point for run in arm.values() for point in run["points"] if point["steps"] == steps and metric in point]
    return spread([point[metric] for point in points]) if points else None


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a row a model, a column a score."""
    from t5lib.diffusion.score_table import METRICS

    arms, final = result["arms"], max(p["steps"] for run in result["arms"][CONTROL].values() for p in run["points"])
    metrics = [name for name in METRICS if any(at(arm, final, name) for arm in arms.values())]
    seeds = sorted({seed for arm in arms.values() for seed in arm})
    models = next(iter(result["arms"][CONTROL].values()))["points"][-1]
    lines = [
        f"# {result['target']}",
        "",
        f"Seeds {', '.join(seeds)}; mean ± standard deviation. {models['generated']} images a model, the same prompts "
        f"and noise for all, beside {models['real']} real ones; features: {models['extractor']}. Device: "
        f"{result['device']}, torch {result['torch']}. An arrow says which way is better.",
        "",
        "| model | " + " | ".join(_heading(METRICS[name]) for name in metrics) + " | seconds |",
        "|---" * (len(metrics) + 2) + "|",
        _row("real images", [_plain(result["real"].get(name), METRICS[name][2]) for name in metrics], ""),
        _row("source", [_plain(result["source"].get(name), METRICS[name][2]) for name in metrics], ""),
    ]
    for name, arm in arms.items():
        for steps in sorted({0, final} & {p["steps"] for run in arm.values() for p in run["points"]}):
            if name == CONTROL and not steps:
                continue  # that is the source
            cells = [found and plus_minus(found, METRICS[m][2]) for m in metrics for found in [at(arm, steps, m)]]
            lines.append(_row(f"{name}, {steps:,} steps", cells, plus_minus(at(arm, steps, "seconds"), 0)))
    return "\n".join([*lines, ""])


def _heading(metric: tuple[str, str, int]) -> str:
    return f"{metric[0]} {'↓' if metric[1] == 'lower' else '↑'}"


def _plain(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _row(name: str, cells: list[str | None], seconds: str) -> str:
    return f"| {name} | " + " | ".join(cell or "" for cell in cells) + f" | {seconds} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument(
        "--layers", nargs="+", default=["paper", "all"], help="layer sets, as convert.layers takes them"
    )
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="of the fine-tunes; 0: none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--out", type=Path, required=True, help="where the .json, .md and .png go, without ending")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/curves"))
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="settings to replace")
    args = parser.parse_args()
    try:
        settings = resolve(Path("."), args.target)
        for key, _, value in (item.partition("=") for item in args.set):
            section, _, name = key.partition(".")
            settings[section][name] = yaml.safe_load(value)
        work = args.work / args.target
        result = run(args.target, settings, args.layers, args.steps, args.seeds, args.out, work, args.jobs)
    except T5Error as error:
        sys.exit(f"curves: {error}")
    print(table(result))


if __name__ == "__main__":
    main()
