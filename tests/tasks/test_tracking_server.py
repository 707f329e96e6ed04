"""A target's stages recorded on a tracking server elsewhere: all of it is there, and the model loads from there."""

import io
import os
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import classifier_target
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tracking_server import tracking_server

from t5lib.utils.files import read_json, sha256
from tasks.runtime import tracking
from tasks.targets.classifier import KEPT, ClassifierTarget
from tasks.targets.run import run_stage

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("tracking-server")]

FEW = {"epochs": 0.34, "batch_size": 8, "lr": 1e-4, "lr_new": 1e-3}
SETTINGS = classifier_target.SETTINGS | {
    "fetch": {"source": "https://someone:secret@host/weights#sha256=1", "architecture": "vit_tiny"},
    "shards": {"train": "file:train.json", "val": "file:val.json"},
    "convert": {"inner": "swiglu", "key_norm": "instance", "locality": "dwc_qk"},
    "calibrate": {"steps": 2, "batch_size": 8, "warmup": 1, "pool": 1, "reuse": 1},
    "align": {"steps": 0},
    "freeze": {"floor": 1.0, "train": {**FEW, "trainable": "new"}},
    "finetune": FEW,
}
STAGES = ("source", "convert", "calibrate", "align", "freeze", "finetune", "control", "evaluate", "report")


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_mlflow):
    with tracking_server(tmp_path_factory.mktemp("server"), empty_mlflow / "mlflow.db") as (address, process):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", address)
            yield address, process


@pytest.fixture(scope="module")
def root(server, tmp_path_factory) -> Path:
    """Where the target was built; the run of the flow is finished as flows.t5 does it."""
    root = tmp_path_factory.mktemp("training")
    classifier_target.write(root)
    flow = tracking.start_flow(root, "tiny", SETTINGS, list(STAGES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tracking.PARENT_VARIABLE, flow.id)
        for name in STAGES:
            run_stage(name, "tiny", params=SETTINGS, root=root, track=True)
    flow.log_images(root / "data/out/tiny/shards", SETTINGS["shards"])
    flow.describe(root / "data/out/tiny")
    flow.finish()
    return root


@pytest.fixture
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(server[0])


@pytest.fixture
def runs(client, root):
    """By name of the stage; "flow" is their parent."""
    experiment = client.get_experiment_by_name("t5").experiment_id
    return {run.data.tags["stage"]: run for run in client.search_runs([experiment])}


def test_a_run_is_there_whole(root, client, runs):
    assert runs.keys() == {"flow", *STAGES}
    parent = runs["flow"]
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs.values()} == {None, parent.info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert [point.step for point in client.get_metric_history(runs["freeze"].info.run_id, "curve/loss")] == [1, 2]
    assert runs["evaluate"].data.metrics["models/finetuned/n"] == classifier_target.VAL
    for run in (parent, runs["report"]):
        assert {"report.html", "summary.md"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    note = parent.data.tags["mlflow.note.content"]
    assert "| Fine-tuned (T5)" in note and "`python -m flows.t5 tiny` at commit" in note
    assert (parent.data.tags["mlflow.source.name"], runs["convert"].data.tags["mlflow.source.name"]) == (
        "flows/t5.py",
        "tasks/convert.py",
    )


def test_the_images_are_named_by_their_manifests(root, runs):
    for run in (runs["flow"], runs["finetune"], runs["evaluate"]):
        found = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
        assert {context: data.name for context, data in found.items()} == {"training": "train", "validation": "val"}
        checksum = sha256(root / "data/out/tiny/shards/train.json")
        assert checksum.startswith(found["training"].digest) and checksum in found["training"].source
    assert not runs["convert"].inputs.dataset_inputs


def test_no_password_of_a_source_reaches_the_server(client, runs):
    flow = runs["flow"]
    assert "host/weights" in flow.data.params["fetch.source"] and "host/weights" in flow.data.tags["source"]
    assert "secret" not in str(flow.to_dictionary())
    assert "secret" not in str(client.get_model_version_by_alias("tiny", "best").tags)


def test_the_model_is_a_version_that_says_what_it_is(root, client, runs):
    version = client.get_model_version_by_alias("tiny", "best")
    score = runs["evaluate"].data.metrics["models/finetuned/top1"]
    told = {"target": "tiny", "measure": "top1 (higher is better)", "score": f"{score:.6g}", "inner": "swiglu"}
    assert (told | {"git_commit": "unknown"}).items() <= version.tags.items()
    assert version.run_id == runs["evaluate"].info.run_id
    [output], [shown] = (runs[name].outputs.model_outputs for name in ("evaluate", "flow"))
    assert shown.model_id == output.model_id
    assert output.model_id in version.source
    assert '"version": "1"' in client.get_logged_model(output.model_id).tags["mlflow.modelVersions"]


def load_and_predict(address: str, images: np.ndarray) -> tuple[dict[str, np.ndarray], str]:
    """In a process that knows none of our code, in another folder."""
    ours = ("t5lib", "t5kernels", "tasks", "flows")
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [place for place in sys.path if not (Path(place) / "t5kernels").is_dir()]
    os.chdir("/")
    import mlflow

    mlflow.set_tracking_uri(address)
    predicted = mlflow.pyfunc.load_model("models:/tiny@best").predict(images)
    return predicted, sys.modules["t5lib"].__file__


def test_the_model_loads_elsewhere_with_its_code_and_predicts_what_was_evaluated(root, server, tmp_path):
    with tarfile.open(root / "data/out/tiny/shards/val.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        images = np.stack([np.array(Image.open(io.BytesIO(file.read()))) for file in files])
    evaluated = load_file(root / "data/out/tiny/finetune" / KEPT)["model"].numpy()
    away = root.rename(tmp_path / "away")
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as elsewhere:
            predicted, code = elsewhere.submit(load_and_predict, server[0], images).result(timeout=120)
    finally:
        away.rename(root)
    np.testing.assert_allclose(predicted["logits"], evaluated, atol=1e-4)
    assert [str(label) for label in predicted["label"]] == [["red", "green", "blue"][i] for i in evaluated.argmax(1)]
    assert Path(code).parts[-3] == "code" and not Path(code).is_relative_to(Path(__file__).parents[2])


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """Settings of a stage that has none."""


def test_a_server_that_stops_in_the_middle_is_told_once_and_the_result_is_kept(root, server, as_stage, capsys):
    def run(stage):
        stage.params(Nothing)
        stage.log({"loss": 1.0}, 1)
        server[1].kill()
        server[1].join()
        stage.artifact(root / "data/out/tiny/evaluate.json")
        stage.log({"loss": 0.5}, 2)
        stage.product = ClassifierTarget.product  # is not asked for anything any more
        return {"top1": 3.0}

    as_stage("convert", Nothing, run)
    begun = time.monotonic()
    assert run_stage("convert", "tiny", params={"convert": {}}, root=root, track=True) == {"top1": 3.0}
    assert time.monotonic() - begun < 15
    said = capsys.readouterr()
    assert said.err.count("the rest of this run is not recorded") == 1 and len(said.err.splitlines()) == 1
    assert read_json(root / "data/out/tiny/convert.json") == {"top1": 3.0}
