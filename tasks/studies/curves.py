"""Quality of a denoiser against fine-tune steps: layer sets, calibrated or not, beside the softmax control.

    python -m tasks.studies.curves sd35-micro --layers paper all --steps 0 100 400 --seeds 0 1 --out results/sd35-micro
    python -m tasks.studies.curves sd35-micro --layers all --arm last convert.layers=all convert.inner=swiglu_last \\
        --steps 400 --control-steps 400 1000 --out results/inner-models

Every point is a training of its own with the target's recipe over so many steps, from the calibrated and aligned (or
merely converted) model; the control is the softmax source under the same recipe. --arm adds models with settings of
their own, and --control-steps gives the control the compute that calibration and alignment had besides. Writes
OUT.json (every figure of every seed, settings, device), OUT.md, OUT.png (curves) and OUT-samples.png, after every arm.
Points that are done are not run again; --jobs processes share the cards that are seen; after --until SECONDS nothing is
begun, and what is there is shown.
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from t5lib.evaluation.generation import read_images
from t5lib.report import plots
from t5lib.report.sample_grid import sample_grid
from t5lib.utils import markdown
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.runtime import command_line
from tasks.runtime.params import changed
from tasks.runtime.stage import Stage
from tasks.studies import common
from tasks.studies.common import with_seed, workspace
from tasks.studies.curves_report import CONTROL, PLAIN, picture, table
from tasks.targets import checked, kind, resolve
from tasks.targets.run import run_stage

SHARED = ("fetch", "shards", "source")  # stages that are the same for all arms and seeds
READ = ("data", "evaluate")  # the sections that an evaluation reads
SHOWN = 6  # rows of samples
UNCALIBRATED = ("calibrate.steps=0", "align.steps=0")
NOT_SHOWN = ("diagnose", "freeze", "explain", "benchmark")  # sections that decide about nothing here


@dataclass(frozen=True)
class Arm:
    """One line of the picture: the control, or a model with settings of its own, written as --set takes them."""

    name: str
    changes: tuple[str, ...]

    @property
    def is_control(self) -> bool:
        return self.name == CONTROL


@dataclass(frozen=True)
class Job:
    """An arm and a seed: what one process does. `settings` are the target's, resolved; `until` is a time.time()."""

    target: str
    arm: Arm
    seed: int
    steps: tuple[int, ...]
    settings: dict[str, Any]
    work: Path
    until: float = math.inf

    @property
    def root(self) -> Path:
        """The folder of these settings alone: pictures that lie there are not drawn again."""
        name = re.sub(r"[^\w+]+", "-", self.arm.name)
        return self.work / f"{name}--seed-{self.seed}--{common.checksum(self.settings)}"

    @property
    def shared(self) -> Path:
        """Where what all arms and seeds share is made."""
        return self.work / f"shared-{common.checksum(_shared_settings(self.settings))}"

    @property
    def out(self) -> Path:
        """Where the stages of this job find each other's outputs."""
        return self.root / f"data/out/{self.target}"

    @property
    def result_file(self) -> Path:
        return self.root / "result.json"

    def result(self) -> dict[str, Any] | None:
        """What is known of it, with the points among `steps`, one at least."""
        result = read_json(self.result_file) if self.result_file.is_file() else {}
        if {"settings": self.settings, "seed": self.seed}.items() <= result.items():
            points = sorted((p for p in result["points"] if p["steps"] in self.steps), key=lambda p: p["steps"])
            return result | {"points": points} if points else None
        return None

    def done(self) -> bool:
        result = self.result()
        return result is not None and [point["steps"] for point in result["points"]] == list(self.steps)


def run(
    target: str,
    settings: dict[str, Any],
    *,
    layers: list[str],
    steps: list[int],
    seeds: list[int],
    out: Path,
    work: Path,
    more: Sequence[Arm] = (),
    control_steps: list[int] | None = None,
    jobs: int = 1,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Run what is not done yet, and write the summary of what is: JSON and tables after every arm, pictures at the end.

    Args:
        settings: of the target, resolved.
        layers: layer sets, as convert.layers takes them; steps: of the fine-tunes, 0 for none; jobs: processes.
        more: arms beside the control and the layer sets; control_steps: those of the control, if others than `steps`.
        seconds: after which no training and no drawing is begun.

    Raises:
        T5Error: a target that is no denoiser, two arms of one name, settings that an arm cannot have, an arm that broke
            (after the others were done), or nothing done in time.
    """
    _check_kind(target, settings)
    until, arms = time.time() + seconds, [*_arms(layers), *more]
    _check_names([arm.name for arm in arms])
    own = {arm.name: control_steps if arm.is_control and control_steps else steps for arm in arms}
    planned = [
        Job(target, arm, seed, tuple(sorted(set(own[arm.name]))), _of_arm(target, settings, arm, seed), work, until)
        for seed in seeds
        for arm in arms
    ]
    for job in {job.shared: job for job in planned}.values():
        _make_shared(job)
    problems, written = [], False
    for outcome in common.run_jobs(add_points, [job for job in planned if not job.done()], jobs, until=until):
        name = f"{outcome.job.arm.name}, seed {outcome.job.seed}"
        print(f"{name}: {outcome.problem or ('done' if outcome.job.done() else 'out of time')}", flush=True)
        problems += [f"{name}: {outcome.last_words}"] if outcome.problem else []
        written = _write(target, settings, planned, out)
    written = written or _write(target, settings, planned, out)
    if written:
        plots.save(picture(read_json(out.with_suffix(".json"))), out.with_suffix(".png"))
        plots.save(samples(planned), out.with_name(f"{out.stem}-samples.png"))
    if problems:
        raise T5Error(f"{len(problems)} of {len(planned)} arms failed: {'; '.join(problems)}")
    if not written:
        raise T5Error(f"no point was finished within {seconds:.0f} s; give it more time")
    return read_json(out.with_suffix(".json"))


def _check_kind(target: str, settings: dict[str, Any]) -> None:
    from tasks.targets.denoiser import DenoiserTarget  # diffusers takes 15 seconds to import

    if issubclass(kind(settings), DenoiserTarget) and not (settings["shards"]["train"] and settings["shards"]["val"]):
        raise T5Error(
            f"'{target}' has no images to fine-tune on, or none to compare with, and these curves are of fine-tunes; "
            "name some in shards.train and shards.val"
        )
    if not issubclass(kind(settings), DenoiserTarget):
        raise T5Error(
            f"'{target}' is a classifier, and these curves are of denoisers; `python -m tasks.studies.seeds` and "
            "`python -m tasks.studies.ablation` compare classifiers"
        )


def _arms(layers: list[str]) -> list[Arm]:
    """The control, and each layer set with attention transfer and without."""
    converted = [Arm(each, (f"convert.layers={each}",)) for each in layers]
    plain = [Arm(arm.name + PLAIN, (*arm.changes, *UNCALIBRATED)) for arm in converted]
    return [Arm(CONTROL, UNCALIBRATED), *(arm for pair in zip(converted, plain, strict=True) for arm in pair)]


def _check_names(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise T5Error(f"two arms are called '{twice[0]}'; the names taken are {', '.join(names)}: give --arm another")


def _of_arm(target: str, settings: dict[str, Any], arm: Arm, seed: int) -> dict[str, Any]:
    return with_seed(checked(changed(settings, arm.changes, target), f"the arm '{arm.name}'"), seed)


def _shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return with_seed({name: settings[name] for name in (*SHARED, *READ)}, 0)


def _make_shared(job: Job) -> None:
    """Fetch, encode and take the source once."""
    note = job.shared / "made.json"
    if note.is_file():
        return
    for name in SHARED:
        run_stage(name, job.target, params=with_seed(job.settings, 0), root=workspace(job.shared))
    write_json(note, _shared_settings(job.settings))


def add_points(job: Job) -> None:
    """Convert, calibrate, then train and score once for every number of steps that is missing, noting each."""
    workspace(job.root)
    _link_shared(job)
    known = job.result() or {"points": []}
    stages = _start(job, known)
    start, training = ("source", "control") if job.arm.is_control else ("align", "finetune")
    before = sum(stage.get("seconds", 0.0) for stage in stages.values())  # converting takes none worth noting
    evaluator, points = _evaluator(job), known["points"]
    drawn = {"source": evaluator.draw("source", job.out / "source", job.shared / "images")}
    for steps in job.steps:
        if steps in [point["steps"] for point in points]:
            continue
        if time.time() > job.until:
            return
        seconds, model = 0.0, job.out / start
        if steps:
            changes = {"finetune": {**job.settings["finetune"], "steps": steps}}
            seconds, model = _stage(job, training, **changes)["seconds"], job.out / training
            common.clean_up()
        drawn["model"] = evaluator.draw(job.arm.name, model, job.root / f"images/{steps}")
        scores = evaluator.scores(drawn)
        points.append({"steps": steps, "seconds": seconds, "seconds_in_all": before + seconds, **scores["model"]})
        result = {"arm": job.arm.name, "seed": job.seed, "settings": job.settings, "stages": stages, "points": points}
        result |= {"source": scores["source"], "real": scores["real images"], "prompts": evaluator.prompts}
        write_json(job.result_file, result | common.machine())


def _start(job: Job, known: dict[str, Any]) -> dict[str, Any]:
    """The model that the trainings start from, made unless it is there; the metrics of the stages that made it."""
    if job.arm.is_control:
        return {}
    if "stages" in known and (job.out / "align").is_dir():
        return known["stages"]
    return {name: _stage(job, name) for name in ("convert", "calibrate", "align")}


def _stage(job: Job, name: str, **changes: Any) -> dict[str, Any]:
    return run_stage(name, job.target, params=job.settings | changes, root=job.root)


def _link_shared(job: Job) -> None:
    """What all arms share, as if it had been made here."""
    job.out.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if not (job.out / name).exists():
            (job.out / name).symlink_to((job.shared / f"data/out/{job.target}/{name}").resolve())


def _evaluator(job: Job) -> Any:
    """What the target's stage `evaluate` draws and scores with."""
    from tasks.targets.denoiser import DenoiserTarget  # diffusers takes 15 seconds to import

    sections = {name: DenoiserTarget.SECTIONS[name] for name in READ}
    stage = Stage("evaluate", job.target, settings=job.settings, sections=sections, root=job.root)
    target = DenoiserTarget(stage)
    return target.sample_evaluator(target.section())


def _write(target: str, settings: dict[str, Any], planned: list[Job], out: Path) -> bool:
    """The summary of all points that are done; False where there is none."""
    runs = [result for job in planned if (result := job.result())]
    if not runs:
        return False
    arms: dict[str, dict[str, Any]] = {}
    for each in runs:
        arms.setdefault(each["arm"], {})[str(each["seed"])] = {key: each[key] for key in ("stages", "points")}
    shown = {key: value for key, value in settings.items() if key not in NOT_SHOWN}
    result = {"target": target, "device": runs[0]["device"], "torch": runs[0]["torch"], "settings": shown}
    result |= {"source": runs[0]["source"], "real": runs[0]["real"], "arms": arms}
    write_json(out.with_suffix(".json"), result)
    markdown.write_page(out.with_suffix(".md"), table(result))
    return True


def samples(jobs: list[Job]) -> Figure:
    """Rows of prompts, a column for the source and one for every arm after its longest fine-tune (which its title
    says), of one seed: that of the first arm that has any."""
    known = [(job, result) for job in jobs if (result := job.result())]
    first, prompts = known[0][0], known[0][1]["prompts"]
    rows = range(0, len(prompts), max(1, len(prompts) // SHOWN))[:SHOWN]
    files = [f"{row:05}.png" for row in rows]
    pictures = {"source": read_images([first.shared / "images" / file for file in files])}
    for job, result in known:
        if job.seed == first.seed:
            steps = result["points"][-1]["steps"]
            folder = job.root / f"images/{steps}"
            pictures[f"{job.arm.name}, {steps:,} steps"] = read_images([folder / file for file in files])
    return sample_grid(pictures, [prompts[row] for row in rows])


def main() -> None:
    parser = common.parser("curves", __doc__)
    command_line.add_target(parser)
    sets = ["paper", "all"]
    parser.add_argument(
        "--layers", nargs="*", default=sets, help="layer sets to compare, as convert.layers takes them, or none"
    )
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "SECTION.NAME=VALUE"),
        help="one more model: its name, and settings to replace; may be given several times (default: none)",
    )
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="steps of the fine-tunes; 0: no fine-tune")
    parser.add_argument("--control-steps", type=int, nargs="+", help="those of the control (default: as --steps)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds; every arm is run with each")
    parser.add_argument("--out", type=Path, required=True, help="path of the .json, .md and .png, with no file ending")
    parser.add_argument("--work", type=Path, default=Path("data/scratch/curves"), help="where partial work is kept")
    parser.add_argument(
        "--until",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="start nothing after this many seconds (default: no limit)",
    )
    common.add_jobs(parser)
    common.add_changes(parser)
    arguments = parser.parse_args()
    with common.reported("curves"):
        result = run(
            arguments.target,
            resolve(Path("."), arguments.target, arguments.set),
            layers=arguments.layers,
            more=[Arm(name, tuple(changes)) for name, *changes in arguments.arm],
            steps=arguments.steps,
            control_steps=arguments.control_steps,
            seeds=arguments.seeds,
            out=arguments.out,
            work=arguments.work / arguments.target,
            jobs=arguments.jobs,
            seconds=arguments.until,
        )
        print(table(result))


if __name__ == "__main__":
    main()
