"""Stages: results appear whole or not at all, crashes leave what is needed to go on, slips are named."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import yaml

from t5lib.utils.errors import SourceError, T5Error
from tasks.runtime.stage import CODE, read_history
from tasks.targets.run import run_stage


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 1


@pytest.fixture
def stage(tmp_path, as_stage):
    """Run a function as stage `demo` of target `a`, in process."""

    def run_as_stage(run, settings=None, name="demo"):
        as_stage(name, Config, run)
        return run_stage(name, "a", params={name: settings or {}}, root=tmp_path)

    return run_as_stage


def write_result(stage):
    (stage.out / "weights").write_text(str(stage.params(Config).size))
    return {"size": stage.params(Config).size, "nested": {"top1": 84.5}}


def fail_with(error):
    def run(stage):
        (stage.out / "half").write_text("half")
        raise error

    return run


def everything_under(folder):
    """All but locks, and notes of the code that began a piece of work."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != CODE]
    return sorted(str(path.relative_to(folder)) for path in files)


def test_output_and_metrics_are_in_their_place_and_nothing_else_is_left(stage, tmp_path):
    assert stage(write_result, {"size": 3}) == {"size": 3, "nested": {"top1": 84.5}}
    assert everything_under(tmp_path) == ["data/out/a/demo.json", "data/out/a/demo/weights"]
    assert json.loads((tmp_path / "data/out/a/demo.json").read_text())["nested"] == {"top1": 84.5}


def test_a_failed_stage_leaves_neither_half_results_nor_those_of_an_earlier_run(stage, tmp_path):
    stage(write_result)
    with pytest.raises(T5Error, match="too hot"):
        stage(fail_with(T5Error("too hot; wait")))
    assert everything_under(tmp_path) == ["data/scratch/a/demo.error.json"]


@pytest.mark.parametrize(
    ("error", "message", "retryable"),
    [
        (T5Error("too hot; wait"), "too hot; wait", False),
        (SourceError("no network", retryable=True), "no network", True),
        (KeyError("x"), "KeyError: 'x'", False),
    ],
    ids=["user", "retryable", "bug"],
)
def test_error_file_tells_message_whether_to_retry_and_where_it_broke(stage, tmp_path, error, message, retryable):
    with pytest.raises(type(error)):
        stage(fail_with(error))
    told = json.loads((tmp_path / "data/scratch/a/demo.error.json").read_text())
    assert (told["message"], told["retryable"]) == (message, retryable)
    assert "test_stage.py" in told["traceback"]
    stage(write_result)
    assert not (tmp_path / "data/scratch/a/demo.error.json").exists()


def test_resume_dir_is_the_same_after_a_crash_another_for_other_settings_and_gone_on_success(stage, tmp_path):
    seen = []

    def run(stage):
        size = stage.params(Config).size
        seen.append((stage.resume_dir(), (stage.resume_dir() / "checkpoint").exists()))
        (stage.resume_dir() / "checkpoint").write_text("")
        if len(seen) < 3:
            raise T5Error("stopped")
        return {"size": size}

    for size in (1, 2):
        with pytest.raises(T5Error, match="stopped"):
            stage(run, {"size": size})
    stage(run, {"size": 1})
    assert seen[0][0] == seen[2][0] != seen[1][0]
    assert [existed for _, existed in seen] == [False, False, True]
    assert everything_under(tmp_path / "data/scratch") == []


def test_partial_work_of_other_code_is_said(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tasks.runtime.stage.OWN_CODE", tmp_path / "tasks")
    (tmp_path / "tasks").mkdir()

    def run(stage):
        stage.resume_dir()
        raise T5Error("stopped")

    for steps, said in ((1, False), (1, False), (2, True)):
        (tmp_path / "tasks/demo.py").write_text(f"steps = {steps}")
        with pytest.raises(T5Error, match="stopped"):
            stage(run)
        assert ("resuming an interrupted run" in (out := capsys.readouterr().out)) == said
    assert "although tasks/demo.py changed since; to start over, delete " in out


def test_resume_dir_is_another_when_an_input_changed(stage, tmp_path):
    folders = []

    def use(stage):
        stage.input("weights")
        folders.append(stage.resume_dir())
        return {}

    for size in (1, 2, 1):
        stage(write_result_named, {"size": size}, name="weights")
        stage(use)
    assert folders[0] == folders[2] != folders[1]


def write_result_named(stage):
    (stage.out / "file").write_text(str(stage.params(Config).size))
    return {}


def test_settings_read_too_late_to_count_are_refused(stage):
    def run(stage):
        stage.log({"loss": 1.0}, 0)
        return {"size": stage.params(Config).size}

    with pytest.raises(RuntimeError, match=r'params\("demo"\) came after resume_dir'):
        stage(run)


def test_history_survives_a_kill_and_later_points_replace_earlier_ones(stage, tmp_path):
    def killed(stage):
        for step in (0, 10, 20):
            stage.log({"loss": 1.0}, step)
        with (stage.resume_dir() / "history.jsonl").open("a") as file:
            file.write('{"step": 30, "lo')  # kill -9 in the middle of a write
        raise T5Error("killed")

    def resumed(stage):
        stage.log({"loss": 0.5}, 20)
        stage.log({"loss": 0.25}, 30)
        stage.log({"val_top1": 80.0}, 30)
        return {}

    with pytest.raises(T5Error):
        stage(killed)
    stage(resumed)
    assert read_history(tmp_path / "data/out/a/demo/history.jsonl") == [
        {"step": 0, "loss": 1.0},
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 0.5},
        {"step": 30, "loss": 0.25, "val_top1": 80.0},
    ]


def dvc_lock(root, name):
    digest = hashlib.md5((root / f"data/out/a/{name}.json").read_bytes()).hexdigest()
    outs = [{"path": f"data/out/a/{name}", "md5": "x.dir"}, {"path": f"data/out/a/{name}.json", "md5": digest}]
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {f"{name}@a": {"outs": outs}}}))


def test_under_dvc_partial_work_stays_until_dvc_has_recorded_the_stage(stage, tmp_path, monkeypatch):
    """DVC, killed while it stores the outputs, removes them and runs the stage again."""
    monkeypatch.setenv("DVC_STAGE", "demo@a")
    seen = []

    def run(stage):
        checkpoint = stage.resume_dir() / "checkpoint"
        seen.append(checkpoint.exists())
        checkpoint.touch()
        return {"top1": len(seen)}

    stage(run)
    stage(write_result_named, name="other")  # sees no dvc.lock
    stage(run)
    dvc_lock(tmp_path, "demo")
    stage(write_result_named, name="other")
    stage(run)
    assert seen == [False, True, False]


def test_a_stage_that_dvc_recorded_and_that_broke_later_keeps_its_partial_work(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "demo@a")
    stage(write_result)
    dvc_lock(tmp_path, "demo")

    def broken(stage):
        (stage.resume_dir() / "checkpoint").touch()
        raise T5Error("stopped")

    with pytest.raises(T5Error):
        stage(broken)
    stage(write_result_named, name="other")
    assert [path.rsplit("/")[-1] for path in everything_under(tmp_path / "data/scratch")] == [
        "demo.error.json",
        "checkpoint",
    ]


def publish(stage):
    size = stage.params(Config).size
    for name in ("train", "val"):
        folder = stage.resume_dir() / name
        folder.mkdir(exist_ok=True)
        if not (folder / "tar").exists():
            (folder / "tar").write_text("encoded by " + str(size))
        stage.publish(name)
    return {}


def no_links(*_):
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("link", [os.link, no_links], ids=["links", "another file system"])
def test_what_is_published_stays_in_scratch_when_the_next_step_fails(stage, tmp_path, monkeypatch, link):
    monkeypatch.setattr(os, "link", link)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "data/out/a/demo.json")

    def fail(path, _):
        if path.name != CODE:
            raise full

    with monkeypatch.context() as patch:
        patch.setattr("tasks.runtime.stage.write_json", fail)  # that of the error file too
        with pytest.raises(T5Error, match=r"demo.json: no space is left .*; partial work is kept in .*scratch/a/demo$"):
            stage(publish)
    kept = [path for path in everything_under(tmp_path / "data/scratch/a/demo") if path.endswith("tar")]
    assert len(kept) == 2
    stage(publish)
    assert everything_under(tmp_path / "data/out/a/demo") == ["train/tar", "val/tar"]
    assert everything_under(tmp_path / "data/scratch") == []


def test_files_that_a_killed_run_was_writing_are_in_nobodys_way(stage, tmp_path):
    def killed(stage):
        (stage.resume_dir() / ".encoding.json.ab12_xyz.json").touch()
        (stage.resume_dir() / "checkpoint").touch()
        raise T5Error("killed")

    with pytest.raises(T5Error):
        stage(killed)
    found = []
    stage(lambda stage: found.append(everything_under(stage.resume_dir())) or {})
    assert found == [["checkpoint"]]


def test_results_that_cannot_be_replaced_are_told_with_their_path(stage, tmp_path, monkeypatch):
    stage(write_result)

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(T5Error, match=r"data/out/a/demo: Permission denied; give this user the right"):
        stage(write_result)


def test_missing_input_is_named_with_the_command_that_makes_it(stage):
    with pytest.raises(T5Error, match="needs it; run `dvc repro convert@a`"):
        stage(lambda stage: stage.input("convert"))
    with pytest.raises(T5Error, match=r"convert\.json does not exist"):
        stage(lambda stage: stage.metrics("convert"))


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda stage: stage.input("convert"), "data/out/a/convert,"),
        (lambda stage: stage.metrics("convert"), "data/out/a/convert.json,"),
        (lambda stage: stage.params(Config), "targets.a.demo,"),
    ],
    ids=["input", "metrics", "params"],
)
def test_what_dvc_yaml_does_not_list_cannot_be_read_unnoticed(stage, tmp_path, read, what):
    (tmp_path / "dvc.yaml").write_text("stages: {demo: {foreach: [a], do: {cmd: x, deps: [], params: []}}}")
    with pytest.raises(RuntimeError, match=f"reads {what} which dvc.yaml does not list"):
        stage(read)


def test_what_dvc_yaml_lists_can_be_read(stage, tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {demo: {foreach: [a], do: {cmd: x, params: ['targets.${item}.demo']}}}")
    assert stage(write_result)["size"] == 1


def test_a_section_that_the_stage_does_not_declare_is_refused(stage):
    with pytest.raises(RuntimeError, match='reads "data", a Config: add it to its READS'):
        stage(lambda stage: stage.params(Config, "data"))


def test_typing_slip_in_a_setting_names_the_nearest(stage):
    with pytest.raises(T5Error, match=r"targets\.a\.demo: unknown setting 'sise'; did you mean 'size'"):
        stage(write_result, {"sise": 3})


def python(repo, *arguments, **options):
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=repo.root, text=True, stdout=-1, stderr=-1, **options)


WITHOUT_SERVICES = """
import runpy, sys
sys.modules |= dict.fromkeys(("prefect", "dvc", "mlflow"))  # importing one of them fails
sys.argv = ["fetch", "small"]
runpy.run_module("tasks.fetch", run_name="__main__", alter_sys=True)
"""


def test_command_line_runs_without_prefect_dvc_and_mlflow_and_ends_with_one_line(small_repo):
    out, err = python(small_repo, "-c", WITHOUT_SERVICES).communicate()
    assert (err, out.splitlines()[0]) == ("", "fetch at work")
    assert out.splitlines()[-1].startswith("fetch done in 0 s: score 3")
    assert (small_repo.root / "data/out/small/fetch/result.txt").read_text() == "2"


def test_command_line_shows_the_message_alone_for_a_mistake_of_the_user(small_repo):
    process = python(small_repo, "-m", "tasks.fetch", "smal")
    _, err = process.communicate()
    assert process.returncode == 1
    assert err == "fetch: params.yaml has no target 'smal'; did you mean 'small'? Targets: small, other\n"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "cancelled"])
def test_an_interrupted_stage_ends_with_130_and_says_that_it_can_go_on(small_repo, sign):
    small_repo.set('{inner: "2"}', '{inner: "2", seconds: 60}')
    process = python(small_repo, "-c", WITHOUT_SERVICES, preexec_fn=lambda: signal.signal(sign, signal.SIG_IGN))
    assert process.stdout.readline() == "fetch at work\n"
    time.sleep(0.2)
    process.send_signal(sign)
    process.communicate(timeout=10)
    told = json.loads((small_repo.root / "data/scratch/small/fetch.error.json").read_text())
    assert (process.returncode, told["retryable"]) == (130, False)
    assert told["message"] == "interrupted; run it again to go on from its last checkpoint"
