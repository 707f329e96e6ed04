"""MLflow: what ran with which settings, its curves and its results. The only module that uses MLflow.

Runs go to data/mlflow, into the experiment "t5", unless MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say otherwise.
Without MLflow installed nothing is recorded and nothing else changes. A problem with the record never stops the work:
it is reported once and the rest of the run goes unrecorded.
"""

import importlib.util
import os
import platform
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256
from tasks.runtime import processes

# Not MLFLOW_RUN_ID: with that one set a stage would write into its parent's run instead of making its own.
# Empty: the flow could not record and has said why; its stages do not try again.
PARENT_VARIABLE = "T5_PARENT_RUN"
FOLDER = Path("data/mlflow")
PROCESS = "process"  # tag: whose a run is
DEFAULTS = {  # of variables that MLflow reads
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a server that is away must cost seconds, not minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
# So that MLflow opens the experiment with charts and models; else it takes it for an evaluation of language models.
KIND = {"mlflow.experimentKind": "custom_model_development"}


def _never_fatal(method: Callable) -> Callable:
    @wraps(method)
    def guarded(self, *args, **kwargs):
        if not self.broken:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self.broken, self.id = True, None
                print(f"MLflow: {type(error).__name__}: {error}; this run is not recorded further", file=sys.stderr)

    return guarded


class NoRun:
    """A run that records nothing."""

    id: str | None = None

    def log_params(self, resolved: dict[str, Any]) -> None: ...

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def set_tags(self, tags: dict[str, str]) -> None: ...

    def adopt_stage(self, root: Path, target: str, stage: str) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...


class Run(NoRun):
    """A run in MLflow. `client` is an MlflowClient, `run_id` that of a run that was created."""

    def __init__(self, client: Any, run_id: str):
        self.client, self.id, self.broken = client, run_id, False
        self._writing: list[Any] = []

    @_never_fatal
    def log_params(self, resolved: dict[str, Any]) -> None:
        """Settings by section, {"data": {"img_size": 98}}, as parameters `data.img_size` and as config.json."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:6000]) for key, value in flatten(resolved).items()]
        for start in range(0, len(params), 100):  # MLflow's limit for one batch
            self.client.log_batch(self.id, params=params[start : start + 100])
        self.client.log_dict(self.id, resolved, "config.json")

    @_never_fatal
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """The numbers among `metrics` (nested names are joined by dots); points of a curve go in the background."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = {key: value for key, value in flatten(metrics).items() if isinstance(value, int | float)}
        # Results as people read them: MLflow's pages show every digit, 99.80000000000001 for 99.8.
        digits = 17 if step is not None else 12
        batch = [Metric(key, float(f"{value:.{digits}g}"), now, step or 0) for key, value in numbers.items()]
        for start in range(0, len(batch), 1000):
            operation = self.client.log_batch(self.id, metrics=batch[start : start + 1000], synchronous=step is None)
            self._writing += [operation] if operation else []

    @_never_fatal
    def log_artifact(self, path: Path) -> None:
        self.client.log_artifact(self.id, str(path))

    @_never_fatal
    def set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    @_never_fatal
    def adopt_stage(self, root: Path, target: str, stage: str) -> None:
        """Note which earlier run holds the results of a stage that did not run now, and the device they come from."""
        made_by = finished_stage(root, target, stage)
        if made_by is None:
            return
        reused = made_by.data.tags.get("mlflow.parentRunId") != self.id
        tags = {f"reused.{stage}": made_by.info.run_id} if reused else {}
        self.set_tags({"device": made_by.data.tags["device"], **tags})

    @_never_fatal
    def finish(self, status: str = "FINISHED") -> None:
        """`status`: FINISHED, FAILED or KILLED."""
        for operation in self._writing:
            operation.wait()
        self.client.set_terminated(self.id, status)


def start_run(root: Path, target: str, name: str, settings: dict[str, Any], tags: dict[str, str]) -> NoRun:
    """Start a run called `name`, nested in the flow's run when PARENT_VARIABLE holds one.

    `settings` are the target's, by section; those that tell one run from another at a glance become tags. Runs whose
    process was killed are marked so.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent == "":
        return NoRun()
    nested = {"mlflow.parentRunId": parent} if parent else {}
    tags = {"target": target, **_telling(settings), **_commit(root), **tags, **nested, "mlflow.user": _user()}
    try:
        client = _client(root)
        if client is None:
            return NoRun()
        experiment = _experiment(client, root)
        if not parent:
            _close_killed(client, experiment)
        run = client.create_run(experiment, run_name=name, tags={**tags, PROCESS: processes.identity()})
    except Exception as error:
        print(f"MLflow: {type(error).__name__}: {error}; this run is not recorded", file=sys.stderr)
        return NoRun()
    return Run(client, run.info.run_id)


def _close_killed(client: Any, experiment: str) -> None:
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=1000):
        if processes.is_gone(run.data.tags.get(PROCESS, "")):
            client.set_terminated(run.info.run_id, "KILLED")


def record_past_run(
    root: Path,
    *,
    name: str,
    target: str,
    settings: dict[str, Any],
    metrics: dict[str, Any],
    tags: dict[str, str],
    started: float,
    ended: float,
    status: str = "FINISHED",
) -> tuple[str, bool]:
    """Write down a run that happened before, perhaps on another machine, as it would stand had it been recorded then.

    Args:
        tags: with "git_commit", "device", and "record": a run with the same `record` is not made again, only metrics
            that changed and its end are brought up to date.
        started, ended: seconds since 1970.

    Returns:
        The run's id, and whether it is new.

    Raises:
        T5Error: MLflow is not installed.
    """
    client = _client(root)
    if client is None:
        raise T5Error("MLflow is not installed here, so there is nothing to record in; pip install 't5-ttt[pipeline]'")
    found = client.search_runs([_experiment(client, root)], f"tags.record = '{tags['record']}'", max_results=1)
    if found:
        known, run_id = found[0].data.metrics, found[0].info.run_id
        run = Run(client, run_id)
        run.log_metrics({key: value for key, value in flatten(metrics).items() if known.get(key) != value})
        client.set_terminated(run_id, status, int(ended * 1000))  # of a whole that has grown since
        return run_id, False
    source = {"mlflow.source.git.commit": tags["git_commit"], "mlflow.user": _user()}
    made = client.create_run(
        _experiment(client, root),
        run_name=name,
        tags={"target": target, **_telling(settings), **source, **tags},
        start_time=int(started * 1000),
    )
    run = Run(client, made.info.run_id)
    run.log_params(settings)
    run.log_metrics(metrics)
    client.set_terminated(made.info.run_id, status, int(ended * 1000))
    return made.info.run_id, True


def protocol(settings: dict[str, Any], names: list[str]) -> str:
    """How long each training stage trains, such as "calibrate 300 steps, freeze 0.5 epochs, finetune 2.0 epochs"."""
    lengths = {
        name: f"{value} {key.rpartition('.')[2]}"
        for name in names
        for key, value in flatten(settings.get(name) or {}).items()
        if key.rpartition(".")[2] in ("steps", "epochs")
    }
    return ", ".join(f"{name} {length}" for name, length in lengths.items())


def finished_stage(root: Path, target: str, stage: str) -> Any | None:
    """The MLflow run that made the stage's present metrics file, or None.

    It is found by the file's checksum: DVC may have brought back results older than the latest run's.
    """
    client, file = _client(root), root / f"data/out/{target}/{stage}.json"
    if client is None or not file.is_file():
        return None
    tags = {"target": target, "stage": stage, "metrics_sha256": sha256(file)}
    wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    found = client.search_runs([_experiment(client, root)], wanted, max_results=1, order_by=["start_time DESC"])
    return found[0] if found else None


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def device() -> str:
    """The device that a stage computes on, for the tag; asks torch only where it is loaded already."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()}, {os.cpu_count()} cores"


def installed() -> bool:
    return importlib.util.find_spec("mlflow") is not None


def _client(root: Path) -> Any | None:
    if not installed():
        return None
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    import logging

    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they announce every table they create
        logging.getLogger(name).setLevel(logging.WARNING)
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return MlflowClient(server)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    _must_open(root / FOLDER / "mlflow.db")
    return MlflowClient(store_uri(root))


def store_uri(root: Path) -> str:
    """MLflow's database as the URI that MLflow takes. Raises T5Error for a path that such a URI cannot hold."""
    database = (root / FOLDER / "mlflow.db").resolve()
    for place in (str(database), os.path.relpath(database)):
        if not set("%?#") & set(place):  # MLflow and what it uses would read them each in its own way
            return f"sqlite:///{place}"
    raise T5Error(f"{database} has one of % ? # in its path, which MLflow cannot take; run this from {root.resolve()}")


def _must_open(database: Path) -> None:
    """Raises sqlite3.Error at once where MLflow would try again for minutes."""
    with closing(sqlite3.connect(database, timeout=10.0)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def _experiment(client: Any, root: Path) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "t5"
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A store elsewhere knows by itself where its artifacts go.
    ours = None if os.environ.get("MLFLOW_TRACKING_URI") else (root / FOLDER / "artifacts").resolve().as_uri()
    return client.create_experiment(name, artifact_location=ours, tags=KIND)


def _telling(settings: dict[str, Any]) -> dict[str, str]:
    convert = settings.get("convert") or {}
    return {name: str(convert[name]) for name in ("inner", "key_norm", "locality") if name in convert}


def _commit(root: Path) -> dict[str, str]:
    commit = git_commit(root)
    return {"git_commit": commit, "mlflow.source.git.commit": commit}


def git_commit(root: Path) -> str:
    """The commit, with "-dirty" when tracked files differ from it; "unknown" outside git."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's nameless user
        return "unknown"
