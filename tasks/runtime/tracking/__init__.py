"""MLflow: what ran with which settings, its curves, its results and its model. The only package that uses MLflow.

Runs go to data/mlflow, into the experiment "t5", unless MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say otherwise.
Without MLflow installed nothing is recorded and nothing else changes. A problem with the record never stops the work:
it is reported once and the rest of the run goes unrecorded.
"""

import os
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from tasks.runtime import processes
from tasks.runtime.tracking import about, store
from tasks.runtime.tracking.run import NoRun, Run, tell
from tasks.runtime.tracking.store import DEFAULTS, FOLDER, store_uri

__all__ = ["DEFAULTS", "FOLDER", "PARENT_VARIABLE", "record_past_run", "start_flow", "start_stage", "store_uri"]

# Not MLFLOW_RUN_ID: with that one set a stage would write into its parent's run instead of making its own.
# Empty: the flow could not record and has said why; its stages do not try again.
PARENT_VARIABLE = "T5_PARENT_RUN"
PROCESS = "process"  # tag: whose a run is


def start_flow(root: Path, target: str, settings: dict[str, Any], stages: list[str]) -> NoRun:
    """Start the run that those of the stages are nested in; `settings` are the target's, by section."""
    note = about.note_of_flow(target, settings, about.git_commit(root))
    tags = {"stage": "flow", "protocol": about.protocol(settings, stages), about.NOTE: note}
    run = _started(root, target, about.name_of_flow(target, settings), settings, "flows/t5.py", tags)
    run.log_params(settings)
    return run


def start_stage(root: Path, target: str, stage: str, settings: dict[str, Any]) -> NoRun:
    """Start a stage's run, nested in the flow's when PARENT_VARIABLE holds one."""
    tags = {"stage": stage, "protocol": stage}
    return _started(root, target, stage, settings, f"tasks/{stage}.py", tags)


def _started(root: Path, target: str, name: str, settings: dict[str, Any], code: str, tags: dict[str, str]) -> NoRun:
    """A run called `name`. Runs whose process was killed are marked so."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent == "":
        return NoRun()
    nested = {"mlflow.parentRunId": parent} if parent else {}
    tags = {"target": target, **about.tags_of(settings, about.git_commit(root), code), **tags, **nested}
    try:
        client = store.client(root)
        if client is None:
            return NoRun()
        experiment = store.experiment(client, root)
        if not parent:
            _close_killed(client, experiment)
        run = client.create_run(experiment, run_name=name, tags={**tags, PROCESS: processes.identity()})
    except Exception as error:
        tell(error, "this run is not recorded")
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
    code: str,
    settings: dict[str, Any],
    metrics: dict[str, Any],
    tags: dict[str, str],
    started: float,
    ended: float,
    status: str = "FINISHED",
) -> tuple[str, bool]:
    """Write down a run that happened before, perhaps on another machine, as it would stand had it been recorded then.

    Args:
        code: the file that made it.
        tags: with "git_commit", "device", and "record": a run with the same `record` is not made again, only metrics
            that changed and its end are brought up to date.
        started, ended: seconds since 1970.

    Returns:
        The run's id, and whether it is new.

    Raises:
        T5Error: MLflow is not installed.
    """
    client = store.client(root)
    if client is None:
        raise T5Error("MLflow is not installed here, so nothing can be recorded; pip install 't5-ttt[pipeline]'")
    found = client.search_runs([store.experiment(client, root)], f"tags.record = '{tags['record']}'", max_results=1)
    if found:
        known, run_id = found[0].data.metrics, found[0].info.run_id
        run = Run(client, run_id)
        run.log_metrics({key: value for key, value in about.metric_names(metrics).items() if known.get(key) != value})
        client.set_terminated(run_id, status, int(ended * 1000))  # of a whole that has grown since
        return run_id, False
    made = client.create_run(
        store.experiment(client, root),
        run_name=name,
        tags={"target": target, **about.tags_of(settings, tags["git_commit"], code), **tags},
        start_time=int(started * 1000),
    )
    run = Run(client, made.info.run_id)
    run.log_params(settings)
    run.log_metrics(metrics)
    client.set_terminated(made.info.run_id, status, int(ended * 1000))
    return made.info.run_id, True
