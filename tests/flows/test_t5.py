"""The flow: DVC stages one by one under a Prefect server, recorded in MLflow, failing with the stage's own words."""

import json
import logging
import re
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from filelock import FileLock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.logging.handlers import APILogWorker
from prefect.states import Completed
from prefect.testing.cli import CycloptsCliRunner

from flows import t5 as t5_module
from flows.t5 import StageError, t5
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.runtime import params
from tasks.runtime.tracking import about

NAME = r"small · swiglu, instance, none · \d{4}-\d\d-\d\d \d\d:\d\d"  # of a whole run in MLflow
pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect", "libraries_loaded"),
]


def task_states(state):
    """The states of a flow run's tasks as the server knows them, by task name."""
    flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=flow_run)
    return {task.name: task.state for task in tasks}


def prefect_cli(*words):
    """What `prefect` prints, here in this process."""
    run = CycloptsCliRunner().invoke(list(words))
    assert run.exit_code == 0, run.output
    return run.stdout


def run_state(target="small"):
    return t5(target, return_state=True)


def test_stages_run_once_are_recorded_and_reused(mlflow_repo, caplog):
    caplog.set_level(logging.INFO)
    assert t5("small") == {"evaluate": {"score": 0.0, "told": "swiglu"}}
    artifacts = json.loads(prefect_cli("artifact", "ls", "-o", "json"))  # the newest of every target and ablation
    [artifact] = [each for each in artifacts if each["key"] == "small"]
    assert artifact["type"] == "markdown"
    assert artifact["description"] == "small is built: evaluate.score 0.0, evaluate.told swiglu."
    assert "| evaluate.score | 0.0 |" in artifact["data"]
    [recorded] = mlflow_repo.recorded(stage="flow")
    assert f"- MLflow run: http://127.0.0.1:5000/#/runs/{recorded.info.run_id} after `make ui`" in artifact["data"]
    assert f"- folder: `{mlflow_repo.root}/data/out/small`" in artifact["data"]
    assert mlflow_repo.calls() == [1, 1, 1]
    assert mlflow_repo.git("status", "--short").split() == ["??", "dvc.lock"]
    lines = [record.getMessage() for record in caplog.records]
    assert "small: fetch → convert → evaluate; unchanged stages are skipped" in lines
    assert "Built from scratch, it takes a moment" in lines
    assert "convert at work" in lines
    assert not [line for line in lines if "lock file" in line or "dvc push" in line]

    mlflow_repo.set("steps: 0", "steps: 1")
    state = run_state()
    assert mlflow_repo.calls() == [1, 1, 2]
    done = {name: task.message for name, task in task_states(state).items()}
    assert done == {"fetch": "nothing changed", "convert": "nothing changed", "evaluate": "done"}

    mlflow_repo.set("steps: 1", "steps: 0")  # DVC brings back the results of the first run
    t5("small")
    assert mlflow_repo.calls() == [1, 1, 2]

    first, second, third = mlflow_repo.recorded(stage="flow")
    made_by = {name: [run.info.run_id for run in mlflow_repo.recorded(stage=name)] for name in mlflow_repo.STAGES}
    parents = [run.data.tags["mlflow.parentRunId"] for run in mlflow_repo.recorded(stage="evaluate")]
    assert parents == [first.info.run_id, second.info.run_id]
    assert reused(first) == {}
    assert reused(second) == {f"reused.{name}": made_by[name][0] for name in ("fetch", "convert")}
    assert reused(third) == {f"reused.{name}": made_by[name][0] for name in ("fetch", "convert", "evaluate")}
    for run, steps in ((first, 0), (second, 1), (third, 0)):
        assert re.fullmatch(NAME, run.info.run_name) and run.info.status == "FINISHED"
        assert run.data.params["evaluate.steps"] == str(steps)
        assert run.data.metrics == {"evaluate/score": steps}
        tags = {"device": about.device(), "protocol": f"fetch 3 steps, convert 3 steps, evaluate {steps} steps"}
        assert (tags | {"inner": "swiglu", "target": "small"}).items() <= run.data.tags.items()


def reused(run):
    return {key: value for key, value in run.data.tags.items() if key.startswith("reused.")}


def test_without_mlflow_a_target_that_is_not_enabled_is_added_and_told(small_repo, unrecorded, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert t5("other") == {"evaluate": {"score": 0.0, "told": "swiglu"}}
    assert "enabled: [small, other] # a comment that must survive" in (small_repo.root / "params.yaml").read_text()
    assert "params.yaml: added 'other' to `enabled`" in caplog.text


def test_a_failing_stage_shows_its_own_words_and_stops_the_flow(mlflow_repo, unrecorded, caplog):
    mlflow_repo.set("{inner: swiglu,", '{inner: swiglu, fail: "top-1 is 9.6, below the floor of 30",')
    state = run_state()
    assert (state.type.value, state.message) == ("FAILED", "convert: top-1 is 9.6, below the floor of 30")
    messages = {name: task.message for name, task in task_states(state).items()}
    assert messages == {"fetch": "done", "convert": state.message}
    assert not [record for record in caplog.records if record.exc_info]
    log = mlflow_repo.root / "data/scratch/small/convert.log"
    assert "ERROR: failed to reproduce" in log.read_text()
    told = [
        "small failed in the stage convert: top-1 is 9.6, below the floor of 30",
        "What to do: fix that, then run the same again; finished stages are kept",
        f"The stage's full output: {log}",
    ]
    APILogWorker.instance().drain()  # flows send what they log now and then
    printed = prefect_cli("flow-run", "logs", str(state.state_details.flow_run_id)).splitlines()
    [reason] = [index for index, line in enumerate(printed) if line.endswith(told[0])]
    assert "| ERROR" in printed[reason]
    assert printed[reason + 1 : reason + 3] == told[1:]
    assert mlflow_repo.calls() == [1, 1, 0]
    assert [run.info.status for run in mlflow_repo.recorded(stage="flow")] == ["FAILED"]


def test_the_command_tells_the_reason_of_a_failure_once(mlflow_repo, unrecorded, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    mlflow_repo.set('{inner: "2"}', '{inner: "2", fail: "top-1 is 9.6, below the floor of 30"}')
    monkeypatch.setattr(t5_module.command, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["t5", "small"])
    with pytest.raises(SystemExit) as end:
        t5_module.main()
    assert end.value.code == "\nfailed; the log above says why"
    lines = caplog.text.splitlines()
    [reason] = [line for line in lines if "below the floor" in line]
    assert "small failed in the stage fetch: top-1 is 9.6" in reason and not any("Failed" in line for line in lines)


def test_only_what_may_pass_by_itself_is_tried_again(mlflow_repo, unrecorded, monkeypatch):
    monkeypatch.setattr(t5_module, "RETRY_AFTER_SECONDS", [0, 0])
    mlflow_repo.set('{inner: "2"}', '{inner: "2", fail: "no network; try later", retryable: true}')
    with pytest.raises(StageError, match="no network"):
        t5("small")
    assert mlflow_repo.calls() == [3, 0, 0]


@contextmanager
def held_until(lock, told):
    """Another flow is at the same target, until it is `told` so."""
    lock.parent.mkdir(parents=True)
    begun = threading.Event()

    def hold():
        with FileLock(lock):
            lock.write_text("process 7 on here: python -m flows.t5 small\n")
            begun.set()
            until = time.monotonic() + 60
            while not told() and time.monotonic() < until:
                time.sleep(0.05)

    other = threading.Thread(target=hold)
    other.start()
    begun.wait()
    yield
    other.join()


def test_the_second_flow_of_a_target_says_whom_it_waits_for(small_repo, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(t5_module.targets, "libraries", lambda settings: ())
    small_repo.set("{steps: 0}", "{stepps: 0}")  # it has nothing to do then
    said = "target small is in use by process 7 on here: python -m flows.t5 small; waiting until it ends"
    with held_until(small_repo.root / "data/scratch/small/flow.lock", lambda: said in caplog.text):
        with pytest.raises(T5Error, match="unknown setting 'stepps'"):
            t5("small")
    assert said in caplog.text


def test_a_bug_in_a_stage_shows_its_kind_and_its_traceback_in_the_log(mlflow_repo, unrecorded, caplog):
    caplog.set_level(logging.INFO)
    mlflow_repo.set('{inner: "2"}', '{inner: "2", crash: true}')
    with pytest.raises(StageError, match=r"^fetch: ZeroDivisionError: division by zero$"):
        t5("small")
    assert 'raise ZeroDivisionError("division by zero")' in caplog.text


def test_what_fails_before_a_stage_begins_is_told_with_dvcs_words(mlflow_repo, unrecorded):
    mlflow_repo.set("deps: ['tasks/fetch.py'", "deps: ['tasks/fetch.py', 'images'", file="dvc.yaml")
    dvc_said = "(?s)^fetch: DVC ended with status 255, saying:.*failed to reproduce 'fetch@small': .*images"
    with pytest.raises(StageError, match=dvc_said):
        t5("small")


@pytest.mark.parametrize(
    ("last", "status", "message"),
    [
        ("fetch: out/a: no space is left on its disk", 1, "fetch: out/a: no space is left on its disk"),
        ("tasks.fetch: its process was killed; if", 1, "tasks.fetch: its process was killed; if"),
        ("fetch: 10/20  loss 1", -9, "fetch: its process was killed; if memory ran out"),
    ],
    ids=["full disk", "killed fork", "killed"],
)
def test_a_stage_that_could_not_leave_its_error_is_told_in_one_line(tmp_path, last, status, message):
    ended = f"ERROR: failed to reproduce 'fetch@a': failed to run: python -m tasks.fetch a, exited with {status}"
    error = t5_module._stage_error("fetch", tmp_path / "fetch.error.json", ["fetch: 1/20  loss 2", last, ended], 255)
    assert str(error).startswith(message) and "\n" not in str(error)


def test_a_disk_that_is_full_for_dvc_is_told_with_what_is_kept(tmp_path):
    lines = ["fetch: 20/20  loss 1", "ERROR: unexpected error - [Errno 28] No space left on device: 'x'"]
    error = t5_module._stage_error("fetch", tmp_path / "fetch.error.json", lines, 255)
    assert str(error).startswith("fetch: no space is left on the disk where DVC keeps the result (unexpected error")
    assert str(error).endswith(f"partial work is kept in {tmp_path / 'fetch'}")


@pytest.mark.parametrize(
    ("words", "old", "new", "message"),
    [
        ("smal", "small", "small", "no target 'smal'; did you mean 'small'"),
        ("small", "{steps: 0}", "{stepps: 0}", "small.evaluate: unknown setting 'stepps'; did you mean 'steps'"),
        ("small --set evaluate.stepps=1", "small", "small", "with --set.evaluate: unknown setting 'stepps'; did you"),
        ("small --set evaluate.steps=1 --as other", "small", "small", "already defines a target 'other'; take another"),
    ],
    ids=["target", "setting", "set", "name"],
)
def test_slips_are_told_before_prefect_starts_and_nothing_is_written(small_repo, monkeypatch, words, old, new, message):
    small_repo.set(old, new)
    before = (small_repo.root / "params.yaml").read_text()
    monkeypatch.setattr(t5_module.targets, "libraries", lambda settings: ())
    monkeypatch.setattr(t5_module.command, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(t5_module, "t5", lambda target: pytest.fail("the flow began"))
    monkeypatch.setattr(sys, "argv", ["t5", *words.split()])
    with pytest.raises(SystemExit, match=message):
        t5_module.main()
    assert small_repo.calls() == [0, 0, 0]
    assert (small_repo.root / "params.yaml").read_text() == before


def test_changed_settings_are_a_target_of_its_own_for_the_flow_and_for_dvc(small_repo, unrecorded, monkeypatch):
    monkeypatch.setattr(t5_module.targets, "libraries", lambda settings: ())
    monkeypatch.setattr(t5_module.command, "interrupt_on_signals", lambda: None)

    def enable(target, on, return_state):
        params.enable(small_repo.root, target)
        return Completed(data={})

    monkeypatch.setattr(t5_module, "t5", enable)
    monkeypatch.setattr(t5_module, "show", lambda root, target: None)
    monkeypatch.setattr(sys, "argv", ["t5", "small", "--set", "fetch.steps=2"])
    t5_module.main()
    built = small_repo.run("dvc", "repro", "-q", "fetch@small-set")
    assert built.returncode == 0, built.stderr
    made = {name: small_repo.root / f"data/out/{name}/fetch.json" for name in ("small-set", "small")}
    assert read_json(made["small-set"])["score"] == 2.0 and not made["small"].exists()
    assert small_repo.git("status", "--short").split()[:4] == ["M", "params.yaml", "??", "dvc.lock"]


def test_what_no_stage_is_to_blame_for_is_told_as_an_error_too(small_repo, caplog):
    with pytest.raises(T5Error, match="no target 'smal'"):
        t5("smal")
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told.startswith("smal failed: params.yaml has no target 'smal'; did you mean 'small'?")


def test_an_interrupt_ends_the_stage_and_marks_the_run(mlflow_repo, unrecorded, monkeypatch):
    mlflow_repo.set('{inner: "2"}', '{inner: "2", seconds: 60}')

    def interrupt(command, on_line, **options):
        def then_interrupt(line):
            if "at work" in line:
                raise KeyboardInterrupt

        return stream(command, then_interrupt, **options)

    stream = t5_module.stream
    monkeypatch.setattr(t5_module, "stream", interrupt)
    with pytest.raises(KeyboardInterrupt):
        t5("small")
    assert {run.info.status for run in mlflow_repo.recorded()} == {"KILLED"}  # the flow and, if it began one, the stage
    monkeypatch.undo()
    monkeypatch.chdir(mlflow_repo.root)
    mlflow_repo.set(", seconds: 60", "")
    assert mlflow_repo.run("dvc", "repro", "-q", "fetch@small").returncode == 0  # no lock is left behind
