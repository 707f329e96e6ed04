"""A run while it is recorded. A problem with the record never stops the work."""

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from t5lib.utils.errors import reason, without_secrets
from t5lib.utils.files import sha256
from tasks.runtime.tracking import registry
from tasks.runtime.tracking.about import NOTE, TELLING, flatten, git_commit, metric_names, tags_of
from tasks.runtime.tracking.data_sets import data_sets
from tasks.runtime.tracking.registry.product import Product
from tasks.runtime.tracking.store import finished_stage

POINTS, SECONDS = 500, 10.0  # of curves that are sent together, and how long the first of them may wait


def _never_fatal(method: Callable) -> Callable:
    @wraps(method)
    def guarded(self, *args, **kwargs):
        if not self.broken:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self.broken, self.id = True, None
                tell(error, "the rest of this run is not recorded")

    return guarded


def tell(error: Exception, what: str) -> None:
    print(without_secrets(f"MLflow: {type(error).__name__} ({reason(error)}); {what}"), file=sys.stderr)


class NoRun:
    """A run that records nothing."""

    id: str | None = None

    def log_params(self, resolved: dict[str, Any]) -> None: ...

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def set_tags(self, tags: dict[str, str]) -> None: ...

    def log_images(self, shards: Path, sources: dict[str, Any]) -> None: ...

    def adopt_stage(self, root: Path, target: str, stage: str, settings: dict[str, Any]) -> None: ...

    def register(self, product: Product) -> None: ...

    def describe(self, out: Path) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...


class Run(NoRun):
    """A run in MLflow. `client` is an MlflowClient, `run_id` that of a run that was created."""

    def __init__(self, client: Any, run_id: str):
        self.client, self.id, self.broken = client, run_id, False
        self._points: list[Any] = []
        self._sent = time.monotonic()

    @_never_fatal
    def log_params(self, resolved: dict[str, Any]) -> None:
        """Settings by section, {"data": {"img_size": 98}}, as parameters `data.img_size` and as config.json."""
        from mlflow.entities import Param

        params = [Param(key, without_secrets(str(value))[:6000]) for key, value in flatten(resolved).items()]
        for start in range(0, len(params), 100):  # MLflow's limit for one batch
            self.client.log_batch(self.id, params=params[start : start + 100])
        self.client.log_text(self.id, without_secrets(json.dumps(resolved, indent=2)), "config.json")

    @_never_fatal
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """The numbers among `metrics` (nested names are joined by slashes); points of a curve are sent now and then."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = {key: value for key, value in metric_names(metrics).items() if isinstance(value, int | float)}
        # Results as people read them: MLflow's pages show every digit, 99.80000000000001 for 99.8.
        digits = 17 if step is not None else 12
        self._points += [Metric(key, float(f"{value:.{digits}g}"), now, step or 0) for key, value in numbers.items()]
        if step is None or len(self._points) >= POINTS or time.monotonic() - self._sent > SECONDS:
            self._send()

    def _send(self) -> None:
        for start in range(0, len(self._points), 1000):  # MLflow's limit for one batch
            self.client.log_batch(self.id, metrics=self._points[start : start + 1000])
        self._points, self._sent = [], time.monotonic()

    @_never_fatal
    def log_artifact(self, path: Path) -> None:
        self.client.log_artifact(self.id, str(path))

    @_never_fatal
    def set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    @_never_fatal
    def log_images(self, shards: Path, sources: dict[str, Any]) -> None:
        """The manifests that the stage `shards` wrote, as data sets; `sources` says where each split came from."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(Dataset(**entry), [InputTag("mlflow.data.context", split)])
            for split, entry in data_sets(shards, sources).items()
        ]
        self.client.log_inputs(self.id, inputs)

    @_never_fatal
    def adopt_stage(self, root: Path, target: str, stage: str, settings: dict[str, Any]) -> None:
        """Note which earlier run holds the results of a stage that did not run now, and the device they come from.

        Results that no run holds, because the server was away, are recorded from their files. `settings`: the target's.
        """
        made_by = finished_stage(root, target, stage)
        if made_by is None:
            self._record_late(root, target, stage, settings)
            return
        reused = made_by.data.tags.get("mlflow.parentRunId") != self.id
        tags = {f"reused.{stage}": made_by.info.run_id} if reused else {}
        self.set_tags({"device": made_by.data.tags["device"], **tags})

    def _record_late(self, root: Path, target: str, stage: str, settings: dict[str, Any]) -> None:
        """A nested run with the metrics and curves of a finished stage; its pictures and its model are not recorded."""
        outputs = root / "data/out" / target
        file, curves = outputs / f"{stage}.json", outputs / stage / "history.jsonl"
        tags = {"target": target, "stage": stage, "protocol": stage, "mlflow.parentRunId": str(self.id)}
        tags |= tags_of(settings, git_commit(root), f"tasks/{stage}.py")
        tags |= {"metrics_sha256": sha256(file), "device": "unknown", "recorded": "later, from its files"}
        own = self.client.get_run(self.id).info.experiment_id
        begun = int(file.stat().st_mtime * 1000)
        late = Run(self.client, self.client.create_run(own, begun, tags, run_name=stage).info.run_id)
        late.log_metrics(json.loads(file.read_text(encoding="utf-8")))
        for line in curves.read_text(encoding="utf-8").splitlines() if curves.is_file() else ():
            point = json.loads(line)
            step = point.pop("step")
            late.log_metrics({f"curve/{name}": value for name, value in point.items()}, step)
        late.finish()

    @_never_fatal
    def register(self, product: Product) -> None:
        """Make the target's model a version in the registry, and say so."""
        own = self.client.get_run(self.id).data.tags
        tags = {name: own[name] for name in (*TELLING, "source", "git_commit") if name in own}
        runs = [str(self.id), *filter(None, [own.get("mlflow.parentRunId")])]
        said = registry.register(self.client, runs, own["target"], product, tags)
        print(f"MLflow: {said}", flush=True)

    @_never_fatal
    def describe(self, out: Path) -> None:
        """Show the results of a whole flow in `out`: the report, and its summary before the note."""
        report = [out / "report/report.html", out / "report/summary.md"]
        if not all(file.is_file() for file in report):
            return
        for file in report:
            self.client.log_artifact(self.id, str(file))
        note = self.client.get_run(self.id).data.tags[NOTE]
        self.set_tags({NOTE: f"{report[1].read_text(encoding='utf-8')}\n{note}"[:8000]})  # MLflow's limit for a tag

    @_never_fatal
    def finish(self, status: str = "FINISHED") -> None:
        """`status`: FINISHED, FAILED or KILLED."""
        self._send()
        self.client.set_terminated(self.id, status)
