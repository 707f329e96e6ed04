"""A target's finished model in MLflow's store: the weights once, the code that loads them, and t5lib.

MLflow runs that code (classifier.py, denoiser.py) where the model is loaded; nothing is pickled. The store of this
machine gets the weights as hard links to data/out where its disk has links; a server gets them from there, without
another copy on the way.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from t5lib.utils.files import link_or_copy, write_json
from tasks.runtime.tracking.registry.product import Product

OURS = ("t5lib", "t5kernels")
PACKAGES = ["torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "pydantic", "webdataset", "mlflow"]
OF_KIND = {"classifier": [], "denoiser": ["diffusers", "transformers", "accelerate"]}
SLOWEST = 10_000_000  # bytes a second: a server may pass an upload on to a store that takes no more


def upload(client: Any, runs: list[str], target: str, product: Product, tags: dict[str, str]) -> LoggedModel:
    """Put the model into the store, as an output of the runs; the first of them scored it."""
    run_id = runs[0]
    experiment = client.get_run(run_id).info.experiment_id
    name = re.sub(r"[/:.%\"']", "-", target)  # MLflow refuses these
    model = client.create_logged_model(experiment, name, run_id, tags=tags, model_type=f"t5 {product.kind}")
    try:
        _store(client, model, product)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error says it
            client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    for each in runs:
        client.log_outputs(each, [LoggedModelOutput(model.model_id, step=0)])
    now = int(time.time() * 1000)
    scores = {name: float(f"{value:.12g}") for name, value in product.scores.items()}
    of_model = {"model_id": model.model_id, "run_id": run_id}
    client.log_batch(run_id, metrics=[Metric(name, value, now, 0, **of_model) for name, value in scores.items()])
    return model


def _store(client: Any, model: LoggedModel, product: Product) -> None:
    about = Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        run_id=model.source_run_id,
        model_id=model.model_id,
    )
    if is_local_uri(model.artifact_location, is_tracking_or_registry_uri=False):
        write_model(Path(local_file_uri_to_path(model.artifact_location)), about, product, link_or_copy)
        return
    with tempfile.TemporaryDirectory(prefix="t5-") as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, about, product, os.symlink)
        with _patience(sum(file.stat().st_size for file in product.files.values())):
            client.log_model_artifacts(model.model_id, str(folder))


@contextlib.contextmanager
def _patience(size: int) -> Iterator[None]:
    """Within, MLflow waits for an answer as long as it may take to store `size` bytes."""
    variable = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[variable]
    os.environ[variable] = str(int(before) + size // SLOWEST)
    try:
        yield
    finally:
        os.environ[variable] = before


def write_model(folder: Path, about: Model, product: Product, link: Callable[[str, str], None]) -> None:
    """Write an MLflow model, `about` with its files, in which those of the product are links."""
    with tempfile.TemporaryDirectory(prefix="t5-") as small:
        write_json(Path(small) / "target/settings.json", product.settings)
        pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name(f"{product.kind}.py")),
            artifacts={"target": f"{small}/target"},
            code_paths=[str(Path(find_spec(name).origin).parent) for name in OURS],  # type: ignore[union-attr, arg-type]
            pip_requirements=[_pinned(name) for name in PACKAGES + OF_KIND[product.kind]],
            signature=_signature(product),
            input_example=_example(product),
            mlflow_model=about,
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
    target = folder / about.flavors["python_function"]["artifacts"]["target"]["path"]
    for name, file in product.files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        link(os.path.realpath(file), str(target / name))
    about.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    about.save(str(folder / "MLmodel"))


def _pinned(package: str) -> str:
    return f"{package}=={version(package).partition('+')[0]}"  # torch calls itself 2.11.0+cpu


def _signature(product: Product) -> ModelSignature:
    if product.kind == "classifier":
        images = TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))
        logits = TensorSpec(np.dtype(np.float32), (-1, len(product.settings["classes"])), "logits")
        labels = TensorSpec(np.dtype(str), (-1,), "label")
        return ModelSignature(Schema([images]), Schema([logits, labels]))
    takes, sampling = product.settings["takes"], product.settings["sampling"]
    wanted = ColSpec(DataType.string if takes == "prompt" else DataType.long, takes)
    drawn = TensorSpec(np.dtype(np.uint8), (-1, -1, -1, product.settings["channels"]))
    return ModelSignature(
        Schema([wanted, ColSpec(DataType.long, "seed", required=False)]),
        Schema([drawn]),
        ParamSchema(
            [
                ParamSpec("steps", DataType.long, sampling["steps"]),
                ParamSpec("guidance", DataType.double, sampling["guidance"]),
            ]
        ),
    )


def _example(product: Product) -> Any:
    if product.kind == "classifier":
        return np.zeros((1, 2, 2, 3), np.uint8)  # any size will do
    import pandas as pd

    takes = product.settings["takes"]
    return pd.DataFrame({takes: ["a photo" if takes == "prompt" else 0], "seed": [0]})
