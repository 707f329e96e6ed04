"""Results of a machine without MLflow become runs like those of a flow, each once."""

import shutil

import ablation
import pytest

from t5lib.utils.errors import T5Error
from tasks.runtime import tracking
from tasks.runtime.tracking import store
from tasks.studies.ablation import mlflow_import

pytestmark = pytest.mark.pipeline


@pytest.fixture
def root(tmp_path, empty_mlflow):
    shutil.copytree(empty_mlflow, tmp_path / tracking.FOLDER)
    return tmp_path


def runs(root, **tags):
    client = store.client(root)
    every = client.search_runs([store.experiment(client, root)], order_by=["start_time ASC"])
    return [run for run in every if tags.items() <= run.data.tags.items()]


def test_a_result_becomes_a_parent_and_a_run_for_every_variant_and_seed_once(root):
    result = ablation.result()
    late = result["records"].pop("linear")
    recorder = mlflow_import.Recorder(root)
    recorder(result, result["records"]["softmax"]["0"])  # as `run` does, one by one
    assert sorted(run.data.tags["stage"] for run in runs(root)) == ["ablation", "variant"]
    assert mlflow_import.import_result(root, result) == (5, 1)
    result["records"]["linear"] = late
    assert mlflow_import.import_result(root, result) == (2, 6)
    assert mlflow_import.import_result(root, result) == (0, 8)

    (parent,) = runs(root, stage="ablation")
    assert (parent.info.run_name, parent.data.tags["ablation"]) == ("small", "small")
    last = max(record["ended"] for seeds in result["records"].values() for record in seeds.values())
    assert parent.info.end_time == int(last * 1000)
    assert parent.data.metrics["mean_top1/linear/finetuned"] == 91.0
    children = runs(root, stage="variant")
    assert len(children) == 8
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}


def test_a_run_tells_what_a_flows_run_tells(root):
    mlflow_import.import_result(root, ablation.result())
    (run,) = runs(root, variant="linear", seed="1")
    assert (run.info.run_name, run.info.status) == ("linear, seed 1", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_060_000)
    tags = {"target": "tiny", "inner": "linear", "key_norm": "instance", "locality": "none", "device": "a card"}
    tags |= {"git_commit": "abc", "protocol": "calibrate 600 steps, finetune 1.0 epochs", "ablation": "small"}
    assert tags.items() <= run.data.tags.items()
    assert {
        "evaluate/models/source/top1": 93.0,
        "evaluate/models/finetuned/top1": 92.0,
        "evaluate/models/calibrated/loss": 0.5,
        "calibrate/error_after": 0.06,
        "seconds/finetune": 20.0,
    }.items() <= {key: pytest.approx(value) for key, value in run.data.metrics.items()}.items()
    assert run.data.params["finetune.batch_size"] == "128" and run.data.params["pilot_chose.lr"] == "0.01"
    (broken,) = runs(root, variant="swiglu", seed="1")
    assert (broken.info.status, broken.data.tags["stopped.finetune"][:24]) == ("FAILED", "training stopped at step")


def test_without_mlflow_a_run_goes_on_unrecorded_and_an_import_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "installed", lambda: False)
    result = ablation.result()
    mlflow_import.Recorder(tmp_path)(result, result["records"]["linear"]["0"])
    with pytest.raises(T5Error, match="MLflow is not installed"):
        mlflow_import.import_result(tmp_path, result)


def test_a_broken_store_costs_the_record_and_not_the_work(root, capsys):
    (root / "data/mlflow/mlflow.db").write_text("not a database")
    result, recorder = ablation.result(), mlflow_import.Recorder(root)
    for seed in ("0", "1"):
        recorder(result, result["records"]["linear"][seed])
    assert capsys.readouterr().err.count("no further result is recorded") == 1


def test_a_file_without_runs_is_told(root):
    with pytest.raises(T5Error, match="'small' has no result yet"):
        mlflow_import.import_result(root, ablation.result() | {"records": {}})
