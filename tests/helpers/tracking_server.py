"""MLflow's tracking server in a process and a folder of its own, on a free port."""

import multiprocessing
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

STORE = "_MLFLOW_SERVER_"  # how `mlflow server` tells its options to the application


@contextmanager
def tracking_server(folder: Path, tables: Path) -> Iterator[tuple[str, BaseProcess]]:
    """Its address, and its process, which may be stopped.

    It is the application of `mlflow server`, forked from here: the command itself imports for ten seconds.

    Args:
        tables: an MLflow database without runs.
    """
    shutil.copy(tables, folder / "mlflow.db")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=[folder, listening])
        process.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        yield address, process
    finally:
        process.kill()
        process.join()


def _serve(folder: Path, listening: socket.socket) -> None:
    os.environ |= {
        f"{STORE}FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        f"{STORE}REGISTRY_STORE": f"sqlite:///{folder}/mlflow.db",
        f"{STORE}ARTIFACT_ROOT": "mlflow-artifacts:/",
        f"{STORE}ARTIFACT_DESTINATION": str(folder / "artifacts"),
        f"{STORE}SERVE_ARTIFACTS": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    import uvicorn
    from mlflow.server.fastapi_app import app

    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])
