"""MLflow on sqlite: what a run holds, what tells runs apart, and that the record never stops the work."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.runtime import processes, tracking
from tasks.runtime.tracking import about, store
from tasks.targets.run import run_stage

pytestmark = pytest.mark.pipeline


@dataclass(frozen=True, kw_only=True)
class Config:
    inner: str
    key_norm: str = "none"
    locality: str = "none"


@pytest.fixture
def convert(mlflow_repo, as_stage):
    """Run a function as the recorded stage `convert` of `small`."""

    def run_it(run):
        as_stage("convert", Config, run)
        return run_stage("convert", "small", root=mlflow_repo.root, track=True)

    return run_it


def learn(stage):
    stage.params(Config)
    for step in range(50):
        stage.log({"loss": 1 / (1 + step)}, step)
    (stage.out / "shift.png").write_bytes(b"png")
    stage.artifact(stage.out / "shift.png")
    return {"top1": 84.50000000000001, "loss": 0.4, "verdict": "good", "models": {"source": {"top1": 85}}}


def test_a_run_holds_curves_results_settings_plots_and_what_tells_it_apart_in_data_alone(mlflow_repo, convert):
    convert(learn)
    (run,) = mlflow_repo.recorded()
    client = store.client(mlflow_repo.root)
    curve = client.get_metric_history(run.info.run_id, "curve/loss")
    assert [(point.step, point.value) for point in curve] == [(step, 1 / (1 + step)) for step in range(50)]
    assert {"top1": 84.5, "loss": 0.4, "models/source/top1": 85.0}.items() <= run.data.metrics.items()
    assert "verdict" not in run.data.metrics
    assert run.data.params == {"convert.inner": "swiglu", "convert.key_norm": "instance", "convert.locality": "none"}
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} == {"config.json", "shift.png"}
    told = {"target": "small", "stage": "convert", "protocol": "convert", "inner": "swiglu", "key_norm": "instance"}
    told |= {
        "locality": "none",
        "git_commit": mlflow_repo.git("rev-parse", "HEAD").strip(),
        "device": about.device(),
    }
    assert told.items() <= run.data.tags.items()
    assert (run.info.run_name, run.info.status) == ("convert", "FINISHED")
    stored = list((mlflow_repo.root / "data/mlflow/artifacts").rglob("config.json"))
    assert read_json(stored[0]) == {"convert": {"inner": "swiglu", "key_norm": "instance", "locality": "none"}}
    assert mlflow_repo.git("status", "--short") == ""  # nothing is written outside data/


@pytest.mark.parametrize(
    ("error", "status"),
    [(T5Error("too hot"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
    ids=["failed", "interrupted"],
)
def test_a_run_that_ends_early_is_marked_and_keeps_its_curve(mlflow_repo, convert, error, status):
    def run(stage):
        stage.log({"loss": 2.0}, 7)
        raise error

    with pytest.raises(type(error)):
        convert(run)
    (run,) = mlflow_repo.recorded()
    assert (run.info.status, run.data.metrics) == (status, {"curve/loss": 2.0})


def test_a_stage_is_nested_in_the_flows_run_and_not_written_into_it(mlflow_repo, convert, monkeypatch):
    parent = tracking.start_flow(mlflow_repo.root, "small", {}, [])
    monkeypatch.setenv(tracking.PARENT_VARIABLE, parent.id)
    convert(learn)
    parent.finish()
    (child,) = mlflow_repo.recorded(stage="convert")
    (flow,) = mlflow_repo.recorded(stage="flow")
    assert child.data.tags["mlflow.parentRunId"] == parent.id == flow.info.run_id
    assert flow.data.metrics == {}


def test_results_are_traced_to_the_run_that_made_them_not_to_the_latest(mlflow_repo, convert):
    metrics = mlflow_repo.root / "data/out/small/convert.json"
    convert(lambda stage: {"top1": 1.0})
    first = metrics.read_bytes()
    convert(lambda stage: {"top1": 2.0})
    (one, two) = mlflow_repo.recorded(stage="convert")
    assert store.finished_stage(mlflow_repo.root, "small", "convert").info.run_id == two.info.run_id
    metrics.write_bytes(first)  # as DVC does when a setting is changed back
    assert store.finished_stage(mlflow_repo.root, "small", "convert").info.run_id == one.info.run_id
    metrics.write_text("{}")
    assert store.finished_stage(mlflow_repo.root, "small", "convert") is None


def test_runs_go_where_mlflows_own_variables_say(mlflow_repo, convert, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    elsewhere = f"sqlite:///{tmp_path}/team.db"
    shutil.copy(mlflow_repo.root / "data/mlflow/mlflow.db", tmp_path / "team.db")  # making its tables takes seconds
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    convert(learn)
    client = MlflowClient(elsewhere)
    experiment = client.get_experiment_by_name("team")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.data.metrics["top1"], run.data.params["convert.inner"]) == (84.5, "swiglu")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert mlflow_repo.recorded() == []


def test_a_server_that_is_away_costs_the_record_and_seconds(mlflow_repo, convert, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nothing listens
    started = time.monotonic()
    assert convert(learn)["verdict"] == "good"
    assert capsys.readouterr().err.count("MlflowException (Connection refused); this run is not recorded") == 1
    assert time.monotonic() - started < 15


def test_what_was_made_while_the_server_was_away_is_recorded_later(mlflow_repo, convert, monkeypatch):
    """By the next flow, which has nothing to do but that, and once."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    convert(learn)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    settings = {"convert": {"inner": "swiglu"}}
    for _ in range(2):
        flow = tracking.start_flow(mlflow_repo.root, "small", settings, ["convert"])
        flow.adopt_stage(mlflow_repo.root, "small", "convert", settings)
        flow.finish()
    [late] = mlflow_repo.recorded(stage="convert")
    assert (late.data.metrics["top1"], late.data.tags["recorded"]) == (84.5, "later, from its files")
    curve = store.client(mlflow_repo.root).get_metric_history(late.info.run_id, "curve/loss")
    assert [point.step for point in curve] and late.info.status == "FINISHED"
    first, second = mlflow_repo.recorded(stage="flow")
    assert late.data.tags["mlflow.parentRunId"] == first.info.run_id
    assert second.data.tags["reused.convert"] == late.info.run_id


def test_uncommitted_changes_show_in_the_commit(mlflow_repo):
    mlflow_repo.set("swiglu", "two_layer")
    assert about.git_commit(mlflow_repo.root) == mlflow_repo.git("rev-parse", "HEAD").strip() + "-dirty"
    assert about.git_commit(mlflow_repo.root / "..") == "unknown"


def test_a_broken_store_costs_the_record_and_neither_the_work_nor_minutes(mlflow_repo, convert, capsys):
    (mlflow_repo.root / "data/mlflow/mlflow.db").write_text("not a database")
    started = time.monotonic()
    assert convert(learn)["verdict"] == "good"
    assert "this run is not recorded" in capsys.readouterr().err
    assert time.monotonic() - started < 15


def test_what_the_flow_could_not_record_its_stages_do_not_try_to(mlflow_repo, convert, capsys, monkeypatch):
    (mlflow_repo.root / "data/mlflow/mlflow.db").write_text("not a database")
    monkeypatch.setenv(tracking.PARENT_VARIABLE, "")
    convert(learn)
    assert capsys.readouterr().err == ""


def test_runs_whose_process_was_killed_do_not_seem_to_run(mlflow_repo, convert):
    host, pid, _ = processes.identity().split()
    client = store.client(mlflow_repo.root)
    experiment = store.experiment(client, mlflow_repo.root)
    owners = {"killed": f"{host} {pid} 1", "elsewhere": f"another {pid} 1", "alive": processes.identity()}
    for name, owner in owners.items():
        client.create_run(experiment, run_name=name, tags={tracking.PROCESS: owner})
    convert(learn)
    status = {run.info.run_name: run.info.status for run in mlflow_repo.recorded()}
    assert status == {"killed": "KILLED", "elsewhere": "RUNNING", "alive": "RUNNING", "convert": "FINISHED"}


@pytest.mark.parametrize("name", ["50%", "a%20b", "why?", "what?x=1#2"])
def test_the_store_stays_in_a_folder_whose_name_means_something_in_a_uri(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert store.store_uri(Path()) == "sqlite:///data/mlflow/mlflow.db"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(T5Error, match="MLflow cannot take; run this from"):
        store.store_uri(tmp_path / name)


def test_a_store_that_breaks_on_the_way_is_reported_once(mlflow_repo, convert, capsys):
    def run(stage):
        stage.run_log.client = None  # every call fails from here on
        stage.log({"loss": 1.0}, 0)
        stage.log({"loss": 0.5}, 1)
        return {"top1": 3.0}

    assert convert(run) == {"top1": 3.0}
    assert capsys.readouterr().err.count("the rest of this run is not recorded") == 1
    assert json.loads((mlflow_repo.root / "data/out/small/convert.json").read_text()) == {"top1": 3.0}
