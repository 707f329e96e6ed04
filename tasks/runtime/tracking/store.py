"""Where runs are kept: data/mlflow, or what MLflow's own variables name."""

import importlib.util
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256

FOLDER = Path("data/mlflow")
DEFAULTS = {  # of variables that MLflow reads
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines a stage
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a server that is away must cost seconds, not minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# So that MLflow opens the experiment with charts and models; else it takes it for an evaluation of language models.
KIND = {"mlflow.experimentKind": "custom_model_development"}


def installed() -> bool:
    return importlib.util.find_spec("mlflow") is not None


def client(root: Path) -> Any | None:
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


def experiment(client: Any, root: Path) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "t5"
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A store elsewhere knows by itself where its artifacts go.
    ours = None if os.environ.get("MLFLOW_TRACKING_URI") else (root / FOLDER / "artifacts").resolve().as_uri()
    return client.create_experiment(name, artifact_location=ours, tags=KIND)


def finished_stage(root: Path, target: str, stage: str) -> Any | None:
    """The MLflow run that made the stage's present metrics file, or None.

    It is found by the file's checksum: DVC may have brought back results older than the latest run's.
    """
    store, file = client(root), root / f"data/out/{target}/{stage}.json"
    if store is None or not file.is_file():
        return None
    tags = {"target": target, "stage": stage, "metrics_sha256": sha256(file)}
    wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    found = store.search_runs([experiment(store, root)], wanted, max_results=1, order_by=["start_time DESC"])
    return found[0] if found else None
