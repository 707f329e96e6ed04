"""Quality of a denoiser against fine-tune steps: layer sets, calibrated or not, beside the softmax control.

    python -m tasks.studies.curves sd35-micro --layers paper all --steps 0 100 400 --seeds 0 1 --out docs/results/sd35-micro

Every point is a training of its own with the target's recipe over so many steps, from the calibrated (or merely
converted) model; the control is the softmax source under the same recipe. Writes OUT.json (every figure of every seed,
settings, device), OUT.md, OUT.png (curves) and OUT-samples.png, after every arm. Points that are done are not run
again; --jobs share the card, or all cards that are seen; after --until SECONDS nothing is begun, and what is there
is shown.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from t5lib.utils.config import from_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json, write_text
from tasks.runtime.params import kind, resolve_with
from tasks.runtime.stage import run_stage
from tasks.studies.ablation.definition import checksum
from tasks.studies.seeds import plus_minus, spread, with_seed, workspace

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
    """An arm and a seed: what one process does. `settings` are the target's, resolved; `until` is a time.time()."""

    target: str
    arm: Arm
    seed: int
    steps: tuple[int, ...]
    settings: dict[str, Any]
    work: Path
    until: float = float("inf")

    @property
    def root(self) -> Path:
        """Of these settings alone: pictures that lie there are not drawn again."""
        name = self.arm.name.replace(", ", "-").replace(" ", "-")
        return self.work / f"{name}--seed-{self.seed}--{checksum(self.settings)}"

    @property
    def shared(self) -> Path:
        """Where what all arms and seeds share is made."""
        return self.work / f"shared-{checksum(_common(self.settings))}"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    def found(self) -> dict[str, Any] | None:
        """What is known of it, with the points among `steps`, one at least."""
        result = read_json(self.result) if self.result.is_file() else {}
        if {"settings": self.settings, "seed": self.seed}.items() <= result.items():
            points = sorted((p for p in result["points"] if p["steps"] in self.steps), key=lambda p: p["steps"])
            return result | {"points": points} if points else None
        return None

    def done(self) -> bool:
        found = self.found()
        return found is not None and [point["steps"] for point in found["points"]] == list(self.steps)


def run(
    target: str,
    settings: dict[str, Any],
    layers: list[str],
    steps: list[int],
    seeds: list[int],
    out: Path,
    work: Path,
    jobs: int,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Run what is not done yet, and write the summary of what is, after every arm.

    Args:
        settings: of the target, resolved.
        layers: layer sets, as convert.layers takes them; steps: of the fine-tunes, 0 for none; jobs: processes.
        seconds: after which no training and no drawing is begun.

    Raises:
        T5Error: a target that is no denoiser, an arm that broke (after the others were done), or nothing done in time.
    """
    if kind(settings) != "denoiser":
        raise T5Error(
            f"'{target}' is a classifier; `python -m tasks.studies.seeds` and `tasks.studies.ablation.__main__` are for those"
        )
    until = time.time() + seconds
    arms = [Arm(None, False), *(Arm(each, calibrated) for each in layers for calibrated in (True, False))]
    planned = [
        Job(target, arm, seed, tuple(sorted(set(steps))), _of_arm(settings, arm, seed), work, until)
        for seed in seeds
        for arm in arms
    ]
    _make_shared(planned[0])
    write = partial(_write, target, settings, planned, out)
    problems = _do([job for job in planned if not job.done()], jobs, write)
    written = write()
    if problems:
        raise T5Error(f"{len(problems)} of {len(planned)} arms broke: {'; '.join(problems)}")
    if not written:
        raise T5Error(f"no point was done within {seconds:.0f} s; give it more time")
    return read_json(out.with_suffix(".json"))


def _of_arm(settings: dict[str, Any], arm: Arm, seed: int) -> dict[str, Any]:
    own = with_seed(settings, seed)
    if arm.layers is not None:
        own["convert"] = own["convert"] | {"layers": arm.layers}
    if not arm.calibrated:
        own["calibrate"] = own["calibrate"] | {"steps": 0}
    return own


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    return with_seed({name: settings[name] for name in (*SHARED, "data", "evaluate")}, 0)


def _make_shared(job: Job) -> None:
    """Fetch, encode and take the source once."""
    note = job.shared / "made.json"
    if note.is_file():
        return
    for name in SHARED:
        run_stage(name, job.target, params=with_seed(job.settings, 0), root=workspace(job.shared))
    write_json(note, _common(job.settings))


def _do(jobs: list[Job], at_once: int, write: Callable[[], Any]) -> list[str]:
    """Do the jobs, and `write` after each; what broke, by name."""
    problems = []
    for problem in _attempts(jobs, at_once):
        problems += [problem] if problem else []
        write()
    return problems


def _attempts(jobs: list[Job], at_once: int) -> Iterator[str | None]:
    if at_once == 1:
        yield from map(attempt, jobs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))  # torch reads it at start
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    cards = context.SimpleQueue()
    for card in islice(cycle(_cards()), at_once):
        cards.put(card)
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=_take_card, initargs=(cards,)) as pool:
        for each in as_completed([pool.submit(attempt, job) for job in jobs]):
            yield each.result()


def _cards() -> list[str]:
    """The cards that are seen, as CUDA_VISIBLE_DEVICES names them; [""] where there are none."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())] or [""]


def _take_card(cards: Any) -> None:
    """Each process sees one card, before CUDA starts in it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = cards.get()


def attempt(job: Job) -> str | None:
    """Do one, unless it is too late to begin; what broke, or None."""
    try:
        if time.time() <= job.until:
            _points(job)
        print(f"{job.arm.name}, seed {job.seed}: {'done' if job.done() else 'out of time'}", flush=True)
    except Exception as error:
        print(f"{job.arm.name}, seed {job.seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return f"{job.arm.name}, seed {job.seed}: {error}"
    return None


def _points(job: Job) -> None:
    """Convert, calibrate, then train and score once for every number of steps that is missing, noting each."""
    import torch

    from t5lib.benchmarks.resolution_sweep import describe_device
    from tasks.targets.classifier import device

    out = workspace(job.root) / f"data/out/{job.target}"
    _link(job, out)
    known = job.found() or {"points": []}
    stages = _start(job, out, known)
    start, training = ("source", "control") if job.arm.layers is None else ("calibrate", "finetune")
    judge, points = _judge(job, out), known["points"]
    drawn = {"source": judge.draw("source", out / "source", job.shared / "images")}
    for steps in job.steps:
        if steps in [point["steps"] for point in points]:
            continue
        if time.time() > job.until:
            return
        metrics, model = {"seconds": 0.0}, out / start
        if steps:
            changes = {"finetune": {**job.settings["finetune"], "steps": steps}}
            metrics, model = _stage(job, training, **changes), out / training
            torch.compiler.reset()  # every training compiles new modules
        drawn["model"] = judge.draw(job.arm.name, model, job.root / f"images/{steps}")
        found = judge.scores(drawn)
        points.append({"steps": steps, "seconds": metrics["seconds"], **found["model"]})
        result = {"arm": job.arm.name, "seed": job.seed, "settings": job.settings, "stages": stages, "points": points}
        result |= {"source": found["source"], "real": found["real images"], "prompts": judge.prompts}
        write_json(job.result, result | {"device": describe_device(device()), "torch": torch.__version__})


def _start(job: Job, out: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The model that the trainings start from, made unless it is there; what the stages said."""
    if job.arm.layers is None:
        return {}
    if "stages" in known and (out / "calibrate").is_dir():
        return known["stages"]
    return {name: _stage(job, name) for name in ("convert", "calibrate")}


def _stage(job: Job, name: str, **changes: Any) -> dict[str, Any]:
    return run_stage(name, job.target, params=job.settings | changes, root=job.root)


def _link(job: Job, out: Path) -> None:
    """What all arms share, as if it had been made here."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if not (out / name).exists():
            (out / name).symlink_to((job.shared / f"data/out/{job.target}/{name}").resolve())


def _judge(job: Job, out: Path) -> Any:
    from tasks.denoisers.data import LatentsConfig
    from tasks.targets.sample_evaluator import EvaluateConfig, Judge

    config, data = (
        from_dict(cls, job.settings[name], name)
        for cls, name in ((EvaluateConfig, "evaluate"), (LatentsConfig, "data"))
    )
    made = {"fetched": out / "fetch", "shards": out / "shards", "source": out / "source"}
    return Judge(config, data, **made, root=job.root)


def _write(target: str, settings: dict[str, Any], planned: list[Job], out: Path) -> bool:
    """The summary of all points that are done; False where there is none."""
    from t5lib.report import plots
    from tasks.studies.curves_pictures import curves_of, samples_of

    runs = [found for job in planned if (found := job.found())]
    if not runs:
        return False
    shown = {key: value for key, value in settings.items() if key not in ("explain", "benchmark", "diagnose", "freeze")}
    arms: dict[str, dict[str, Any]] = {}
    for each in runs:
        arms.setdefault(each["arm"], {})[str(each["seed"])] = {key: each[key] for key in ("stages", "points")}
    result = {"target": target, "device": runs[0]["device"], "torch": runs[0]["torch"], "settings": shown}
    result |= {"source": runs[0]["source"], "real": runs[0]["real"], "arms": arms}
    write_json(out.with_suffix(".json"), result)
    write_text(out.with_suffix(".md"), table(result))
    plots.save(curves_of(result, CURVES), out.with_suffix(".png"))
    plots.save(samples_of(planned), out.with_name(f"{out.stem}-samples.png"))
    return True


def at(arm: dict[str, Any], steps: int, metric: str) -> dict[str, float] | None:
    """Mean and deviation over the seeds of one arm's score after `steps`; None where it has none."""
    points = [point for run in arm.values() for point in run["points"] if point["steps"] == steps and metric in point]
    return spread([point[metric] for point in points]) if points else None


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a row a model, a column a score."""
    from t5lib.report.score_table import METRICS

    arms, points = result["arms"], [p for arm in result["arms"].values() for run in arm.values() for p in run["points"]]
    ends = {0, *(max(p["steps"] for run in arm.values() for p in run["points"]) for arm in arms.values())}
    models = points[-1]
    metrics = [name for name in METRICS if any(name in point for point in points)]
    seeds = sorted({seed for arm in arms.values() for seed in arm})
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
        own = {point["steps"] for run in arm.values() for point in run["points"]}
        for steps in sorted(ends & own):
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
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.curves", description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument(
        "--layers", nargs="+", default=["paper", "all"], help="layer sets, as convert.layers takes them"
    )
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="of the fine-tunes; 0: none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the card, or the cards")
    parser.add_argument("--out", type=Path, required=True, help="where the .json, .md and .png go, without ending")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/curves"))
    parser.add_argument("--until", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing later")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="settings to replace")
    args = parser.parse_args()
    try:
        settings = resolve_with(Path("."), args.target, args.set)
        work, until = args.work / args.target, args.until
        result = run(args.target, settings, args.layers, args.steps, args.seeds, args.out, work, args.jobs, until)
    except T5Error as error:
        sys.exit(f"curves: {error}")
    print(table(result))


if __name__ == "__main__":
    main()
