"""What a stage is given: its settings, its inputs, and the places for what it makes, so that a crash costs little.

Where several processes share the work of a stage, the first of them writes what there is to write.
"""

import hashlib
import json
import os
import shutil
import traceback
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import yaml

from t5lib.utils import processes
from t5lib.utils.config import AnySettings, from_dict, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import link_or_copy, read_json, remove_leftovers, sha256, write_json, write_text
from t5lib.utils.locks import exclusive
from tasks.runtime.tracking.registry.product import Product
from tasks.runtime.tracking.run import NoRun

OWN_CODE = Path(__file__).parents[1]
CODE = "code.json"  # in the scratch folder of a stage: which of its own files began the work
HISTORY = "history.jsonl"  # there, and among the outputs: points of curves
FINISHED = "finished"  # in the scratch folder of a stage that succeeded, until DVC has recorded it


class Stage:
    """One stage of one target: its settings, its inputs, and the places for what it makes.

    Attributes:
        name, target: such as "convert" and "dinov2-fashion".
        root: the repository's folder.
        settings: of the target, by section.
        product: the target's finished model, from the stage that has scored it.
    """

    def __init__(self, name: str, target: str, *, settings: dict[str, Any], sections: dict[str, type], root: Path):
        self.name, self.target, self.root = name, target, root
        self.resolved: dict[str, Any] = {}  # what params() gave out, as plain values
        self.run_log: NoRun = NoRun()  # its MLflow run
        self.product: Product | None = None  # to be registered once the stage has succeeded
        self.settings, self._sections = settings, sections
        self._declared = _declared(root, name, target)
        self._configs: dict[str, Any] = {}
        self._used: dict[str, str] = {}  # what input() and metrics() gave out, as checksums
        self._resume_dir: Path | None = None

    def params(self, cls: type[AnySettings], section: str | None = None) -> AnySettings:
        """The section `targets.<target>.<section>` of params.yaml (default: the stage's own) as a `cls`.

        Raises:
            T5Error: missing section, unknown setting, or a value of the wrong type.
        """
        section = section or self.name
        if section in self._configs:
            return self._configs[section]
        if self._sections.get(section) is not cls:
            raise RuntimeError(f'tasks/{self.name}.py reads "{section}", a {cls.__name__}: add it to its READS')
        where = f"params.yaml: targets.{self.target}"
        if section not in self.settings:
            raise T5Error(f"{where} has no section '{section}', which stage '{self.name}' reads; add it, empty: {{}}")
        self._must_be_declared(f"targets.{self.target}.{section}")
        config = from_dict(cls, self.settings[section], f"{where}.{section}")
        self._still_open(f'params("{section}")')
        self.resolved[section] = to_dict(config)
        self.run_log.log_params(self.resolved)
        self._configs[section] = config
        return config

    def input(self, stage: str) -> Path:
        """The output folder of another stage of this target. Raises T5Error when it was not made yet."""
        path = self._outputs / stage
        self._must_be_declared(f"data/out/{self.target}/{stage}")
        if not path.is_dir():
            raise T5Error(f"{path} does not exist, and '{self.name}' needs it; {self._remedy(stage)}")
        if stage not in self._used and processes.leads():
            self._still_open(f'input("{stage}")')
            self._used[stage] = _checksum(path)
            if stage == "shards":
                self.run_log.log_images(path, self.settings.get("shards") or {})
        return path

    def metrics(self, stage: str) -> dict[str, Any]:
        """The metrics of another stage of this target. Raises T5Error when it did not run yet."""
        path = self._outputs / f"{stage}.json"
        self._must_be_declared(f"data/out/{self.target}/{stage}.json")
        if not path.is_file():
            raise T5Error(f"{path} does not exist, and '{self.name}' needs it; {self._remedy(stage)}")
        self._still_open(f'metrics("{stage}")')
        self._used[path.name] = sha256(path)
        return read_json(path)

    @property
    def out(self) -> Path:
        """The folder to write results to; it takes its final place, `data/out/<target>/<stage>`, on success."""
        return self._outputs / f".{self.name}.partial"

    def resume_dir(self) -> Path:
        """The folder for checkpoints: the same one again after a crash, as long as settings and inputs are the same.

        Call it (and `log`) after params(), input() and metrics() were asked for the last new one, and first of all in
        all processes that share the work. It is removed on success; under DVC, once DVC has recorded that.
        """
        if self._resume_dir is None:
            self._resume_dir = processes.by_first(self._prepared)
        return self._resume_dir

    def _prepared(self) -> Path:
        made_from = json.dumps([self.resolved, self._used], sort_keys=True)
        folder = self._partial_work / hashlib.sha256(made_from.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        history = folder / HISTORY
        _rewrite_history(history, history)  # a killed run may have left half a line
        self._compare_code(folder / CODE)
        return folder

    def _compare_code(self, note: Path) -> None:
        """Say that partial work was begun by other code of this stage; checkpoints refuse other code of the library."""
        own = [OWN_CODE / f"{self.name}.py", *sorted((OWN_CODE / "targets").glob("*.py"))]
        code = {str(file.relative_to(OWN_CODE.parent)): sha256(file) for file in own if file.is_file()}
        before = read_json(note) if note.is_file() else code
        if changed := sorted(name for name in before.keys() | code.keys() if before.get(name) != code.get(name)):
            print(
                f"resuming an interrupted run, although {', '.join(changed)} changed since; "
                f"to start over, delete {note.parent}",
                flush=True,
            )
        else:
            write_json(note, code)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to the stage's curves (`history.jsonl` and MLflow)."""
        self.resume_dir()
        with self._history.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.run_log.log_metrics({f"curve/{name}": value for name, value in metrics.items()}, step)

    def artifact(self, path: Path | str) -> None:
        """Also show this picture or JSON file in MLflow (not weights: DVC keeps those)."""
        self.run_log.log_artifact(Path(path))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file among the outputs, and show it in MLflow."""
        if processes.leads():
            write_json(self.out / name, value)
            self.artifact(self.out / name)

    def publish(self, name: str) -> None:
        """Put a folder of resume_dir() among the outputs; it stays there too, by hard links where possible.

        Of several processes all call it, and find it there afterwards.
        """
        folder = self.resume_dir() / name
        processes.by_first(lambda: shutil.copytree(folder, self.out / name, copy_function=link_or_copy))

    @property
    def metrics_file(self) -> Path:
        return self._outputs / f"{self.name}.json"

    @property
    def error_file(self) -> Path:
        return self._scratch / f"{self.name}.error.json"

    def kept(self) -> str:
        """What there is still when the stage broke, in words."""
        partial = any(path.is_file() for path in self._partial_work.rglob("*"))
        return f"partial work is kept in {self._partial_work}" if partial else "the results of other stages are kept"

    @property
    def _partial_work(self) -> Path:
        return self._scratch / self.name

    @property
    def _outputs(self) -> Path:
        return self.root / "data/out" / self.target

    @property
    def _scratch(self) -> Path:
        return self.root / "data/scratch" / self.target

    @property
    def _history(self) -> Path:
        return self.resume_dir() / HISTORY

    def _must_be_declared(self, what: str) -> None:
        if self._declared is not None and what not in self._declared:
            raise RuntimeError(
                f"tasks/{self.name}.py reads {what}, which dvc.yaml does not list for stage '{self.name}'; "
                "add it, or DVC will not notice when it changes"
            )

    def _still_open(self, call: str) -> None:
        if self._resume_dir is not None:
            raise RuntimeError(
                f"tasks/{self.name}.py: {call} came after resume_dir() or log(), whose folder needs it; call it first"
            )

    def _remedy(self, stage: str) -> str:
        return f"run `dvc repro {stage}@{self.target}` or `python -m flows.t5 {self.target}`"

    def alone(self) -> AbstractContextManager[None]:
        """Within, no other process makes this stage of this target."""
        lock = self._scratch / f"{self.name}.lock"
        return exclusive(lock, f"stage {self.name} of {self.target}")

    def begin(self) -> None:
        """Clear what an earlier run left, so that nothing stale is ever taken for a result."""
        self.error_file.unlink(missing_ok=True)
        remove_recorded(self.root, self.target)
        if self._partial_work.is_dir():
            remove_leftovers(self._partial_work)
            (self._partial_work / FINISHED).unlink(missing_ok=True)
        for folder in (self.out, self._outputs / self.name):
            if folder.is_dir():
                shutil.rmtree(folder)
        self.metrics_file.unlink(missing_ok=True)
        self.out.mkdir(parents=True)

    def succeed(self, metrics: dict[str, Any]) -> None:
        """Put outputs and metrics in their place."""
        if self._resume_dir is not None:
            _rewrite_history(self._history, self.out / HISTORY)
        self.out.replace(self._outputs / self.name)
        write_json(self.metrics_file, metrics)
        if "DVC_STAGE" in os.environ and self._partial_work.is_dir():  # DVC drops the outputs if it is killed now
            (self._partial_work / FINISHED).touch()
        else:
            shutil.rmtree(self._partial_work, ignore_errors=True)

    def fail(self, error: BaseException) -> bool:
        """Leave the error where the flow finds it; partial work stays in resume_dir().

        False where it is but the end of another process's error, which is there already.
        """
        if not processes.alone() and self.error_file.exists():
            return False
        shutil.rmtree(self.out, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            message = "interrupted; run it again to go on from its last checkpoint"
        else:
            message = str(error) if isinstance(error, T5Error) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the disk may be full: `error` says so, and this must not take its place
            write_json(
                self.error_file,
                {
                    "message": message,
                    "retryable": getattr(error, "retryable", False),
                    "traceback": "".join(traceback.format_exception(error)),
                },
            )
        return True


def remove_recorded(root: Path, target: str) -> None:
    """Remove the partial work of the target's stages that succeeded and whose results DVC has recorded."""
    finished = list((root / "data/scratch" / target).glob(f"*/{FINISHED}"))
    lock = root / "dvc.lock"
    if not finished or not lock.is_file():
        return
    recorded = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    for mark in finished:
        name = mark.parent.name
        metrics = f"data/out/{target}/{name}.json"
        outs = {out["path"]: out.get("md5") for out in recorded.get(f"{name}@{target}", {}).get("outs", [])}
        if (root / metrics).is_file() and outs.get(metrics) == _md5(root / metrics):
            shutil.rmtree(mark.parent, ignore_errors=True)


def _declared(root: Path, name: str, target: str) -> set[str] | None:
    """What the stage depends on by dvc.yaml, with the target's name filled in; None where it has no such stage."""
    path = root / "dvc.yaml"
    stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else {}
    if name not in stages:
        return None
    entry = stages[name].get("do", stages[name])
    return {item.replace("${item}", target) for item in [*entry.get("deps", []), *entry.get("params", [])]}


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _checksum(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_history(path: Path | str) -> list[dict[str, Any]]:
    """The points of a history.jsonl in order of their steps; what was logged again after a resume replaces the old."""
    points: dict[int, dict[str, Any]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line, from a run that was killed while writing it
        points.setdefault(point["step"], {}).update(point)
    return [points[step] for step in sorted(points)]


def _rewrite_history(source: Path, to: Path) -> None:
    if source.is_file():
        write_text(to, "".join(json.dumps(point) + "\n" for point in read_history(source)))
