"""The variants of an ablation as a queue of DVC experiments: each the target's whole pipeline with other settings."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t5lib.utils.errors import T5Error
from tasks.runtime import params
from tasks.runtime.tracking import flatten
from tasks.studies.ablation.definition import Plan, Unit
from tasks.studies.seeds import with_seed

NEWEST_QUEUED = "refs/exps/celery/stash"  # where DVC keeps what is queued, the newest on top
GATE_OFF = 0.0  # a weak variant is a result here, not a reason to stop


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A DVC experiment: the `changes` to `target`'s settings, by dotted name."""

    name: str
    target: str
    changes: dict[str, Any]

    @property
    def command(self) -> list[str]:
        settings = [f"enabled=[{self.target}]"]
        settings += [f"++targets.{self.target}.{key}={_spelled(value)}" for key, value in self.changes.items()]
        return ["dvc", "exp", "run", "--queue", "--name", self.name, *(part for s in settings for part in ("-S", s))]


def experiments(plan: Plan, root: Path, seeds: list[int], only: list[str] | None = None) -> list[Experiment]:
    """One a variant and seed. The softmax control is a stage of every pipeline, no variant."""
    units = [unit for unit in plan.units if unit.settings["convert"] and (not only or unit.variant in only)]
    return [_experiment(plan, unit, seed, root) for unit in units for seed in seeds]


def put(queue: list[Experiment], root: Path) -> None:
    """Queue the experiments of the repository `root`.

    Raises:
        T5Error: DVC refuses one, its own words are in the message; or it lost a change on the way.
    """
    for experiment in queue:
        run = subprocess.run(experiment.command, cwd=root, env=environment(), capture_output=True, text=True)
        if run.returncode:
            raise T5Error(f"`dvc exp run --queue` failed for {experiment.name}: {run.stderr.strip() or run.stdout}")
        _check_arrived(experiment, root)


def _check_arrived(experiment: Experiment, root: Path) -> None:
    """DVC edits params.yaml as a tree; where two sections are one by a YAML alias, one undoes the other in silence."""
    show = ["git", "-C", str(root), "show", f"{NEWEST_QUEUED}:params.yaml"]
    text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    there = flatten(yaml.safe_load(text)["targets"][experiment.target])
    lost = [key for key, value in experiment.changes.items() if there.get(key) != value]
    if lost:
        raise T5Error(
            f"experiment {experiment.name} is queued without its {', '.join(lost)}: in params.yaml a section of "
            f"{experiment.target} is an alias (*name); merge it instead, {{<<: *name}}, and empty the queue with "
            "`dvc queue remove --queued`"
        )


def unsaid(plan: Plan) -> list[str]:
    """What of the ablation a pipeline does not do, in sentences."""
    said = ["A pipeline has no pilot: every variant calibrates with the rates that its settings name."]
    if plan.images.train or plan.images.val:
        said.append("A pipeline uses all images of the target's shards, not the first ones.")
    return said


def environment() -> dict[str, str]:
    """The DVC that belongs to this Python comes first."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def _experiment(plan: Plan, unit: Unit, seed: int, root: Path) -> Experiment:
    before = params.resolve(root, plan.target)
    wanted = with_seed(_pipeline(plan, unit, before), seed)
    changes = _changed(flatten(before), flatten(wanted)) | _absolute(wanted, root)
    name = f"{plan.name}-{unit.variant}-{seed}".replace("_", "-")
    return Experiment(name=name, target=plan.target, changes=changes)


def _pipeline(plan: Plan, unit: Unit, before: dict[str, Any]) -> dict[str, Any]:
    """The target's sections, with the unit's settings in their places."""
    own = unit.settings
    wanted = {**before, **plan.settings, "convert": own["convert"]}
    wanted["calibrate"] = own["calibrate"] or {**before["calibrate"], "steps": 0}
    wanted["freeze"] = {"floor": GATE_OFF, "train": own.get("freeze", before["freeze"]["train"])}
    wanted["finetune"] = own.get("finetune", before["finetune"])
    return wanted


def _changed(before: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    missing = object()
    return {key: value for key, value in wanted.items() if before.get(key, missing) != value}


def _absolute(wanted: dict[str, Any], root: Path) -> dict[str, Any]:
    """Local sources that git does not hold, by their full path: an experiment runs in a checkout of its own."""
    sources = {
        "fetch.source": wanted["fetch"]["source"],
        **{f"shards.{split}": wanted["shards"][split] for split in wanted["shards"]},
    }
    full = {}
    for key, source in sources.items():
        path = Path(source.removeprefix("file:")).expanduser()
        if source.startswith("file:") and not path.is_absolute() and not _tracked(root, path):
            full[key] = f"file:{(root / path).resolve()}"
    return full


def _tracked(root: Path, path: Path) -> bool:
    known = ["git", "-C", str(root), "ls-files", "--error-unmatch", str(path)]
    return subprocess.run(known, capture_output=True).returncode == 0


def _spelled(value: Any) -> str:
    """A value as Hydra's grammar, which DVC uses, reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value)
