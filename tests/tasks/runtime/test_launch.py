"""A stage in several processes: one command, one result, one error; nothing hangs and nothing goes on without its
launcher."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from t5lib.utils.errors import T5Error
from tasks.runtime import launch, warm

pytestmark = pytest.mark.xdist_group("processes")
STAGE = """
import os, signal, time
from t5lib.utils import processes
from t5lib.utils.errors import T5Error
from t5lib.utils.progress import progress
from tasks.targets.run import main

READS = ("convert",)
TOGETHER = True

def run(target):
    stage, state = target.stage, processes.state()
    config = stage.params(target.SECTIONS["convert"])
    folder = stage.resume_dir()
    (folder / f"pid{state.process_index}").write_text(str(os.getpid()))
    print("one at work", flush=True)
    if state.process_index == 1:
        if config.fail:
            raise T5Error(config.fail)
        if config.inner == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    with progress("work", 3) as bar:
        for step in range(3):
            total = sum(processes.gathered(state.process_index + 1))
            time.sleep(config.seconds)
            bar.advance(step + 1)
    if processes.leads():
        (stage.out / "result.txt").write_text(f"{total} of {state.num_processes}")
    return {"total": total}

if __name__ == "__main__":
    main(run)
"""
LIBRARIES = ("torch", "accelerate.commands.launch", "torch.distributed.run", "accelerate")


@pytest.fixture(scope="module")
def repo(make_small_repo, tmp_path_factory):
    """The stage `convert` is done in two processes; all start from one that has imported what they need."""
    repo = make_small_repo(tmp_path_factory.mktemp("launch") / "repo")
    (repo.root / "tasks/convert.py").write_text(STAGE)
    (repo.root / "site").mkdir()
    (repo.root / "site/sitecustomize.py").write_text('import sys; sys.modules["mlflow"] = None')
    repo.env = os.environ | {"PYTHONPATH": f"{repo.root / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    repo.env["PYTHONPATH"] = f"{repo.root}{os.pathsep}{repo.env['PYTHONPATH']}"
    with warm.serving(LIBRARIES, repo.env) as variables:
        repo.env |= variables
        yield repo


@pytest.fixture
def convert(repo):
    """Starts the stage with these settings; what it is started by comes first."""

    def start(settings: str = "{}", *before: str, launch: str = "{processes: 2}", **told: str) -> subprocess.Popen:
        params = yaml.safe_load((repo.root / "params.yaml").read_text())
        params["launch"] = yaml.safe_load(launch)
        params["targets"]["small"]["convert"] = yaml.safe_load(settings)
        (repo.root / "params.yaml").write_text(yaml.safe_dump(params))
        for made in ("data/scratch", "data/out"):
            shutil.rmtree(repo.root / made, ignore_errors=True)
        command = [*(before or (sys.executable,)), "-m", "tasks.convert", "small"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=repo.root, env=repo.env | told, **pipes)

    return start


def at_work(repo, number: int = 2) -> list[psutil.Process]:
    """The processes of the stage, once all have begun."""
    end = time.monotonic() + 60
    while len(files := list(repo.root.glob("data/scratch/small/convert/*/pid*"))) < number or not all(
        file.read_text() for file in files
    ):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
    return [psutil.Process(int(file.read_text())) for file in files]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def error(repo) -> str:
    return json.loads((repo.root / "data/scratch/small/convert.error.json").read_text())["message"]


def test_one_command_starts_them_and_one_writes_and_shows(repo, convert):
    run = convert()
    out, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert (repo.root / "data/out/small/convert/result.txt").read_text() == "3 of 2"
    assert [out.count(words) for words in ("2 processes", "one at work", "work: 3/3", "convert done in")] == [1] * 4


def test_under_torchrun_they_join_it(repo, convert):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3")
    run = convert("{steps: 2}", *torchrun)
    _, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert (repo.root / "data/out/small/convert/result.txt").read_text() == "6 of 3"


def test_two_nodes_given_the_same_command_join_one_group(repo, convert):
    here = f"{{processes: 1, nodes: 2, address: '127.0.0.1:{free_port()}'}}"
    runs = [convert(launch=here, NODE_RANK=str(node)) for node in (1, 0)]
    ends = [run.communicate(timeout=90) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    assert (repo.root / "data/out/small/convert/result.txt").read_text() == "3 of 2"


def test_the_tasks_of_a_slurm_step_join_one_group(repo, convert):
    step = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "127.0.0.[1,9]", "SLURM_LOCALID": "0"}
    runs = [convert(**step, SLURM_PROCID=rank, SLURM_NODEID=rank) for rank in "01"]
    ends = [run.communicate(timeout=90) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    assert (repo.root / "data/out/small/convert/result.txt").read_text() == "3 of 2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{fail: too few images, seconds: 20}", "too few images"),
        ("{inner: killed, seconds: 20}", "process 1 of 2 was killed, and the others were stopped; if memory ran out"),
    ],
)
def test_what_goes_wrong_in_one_ends_all_at_once_and_is_the_one_error(settings, message, repo, convert):
    begun, run = time.monotonic(), convert(settings)
    _, err = run.communicate(timeout=90)
    assert run.returncode == 1 and time.monotonic() - begun < 40  # their work would take a minute
    assert err.count(message) == 1 and error(repo).startswith(message) and "Traceback" not in err
    assert not (repo.root / "data/out/small/convert").exists()


def test_an_interrupt_reaches_all_of_them_and_is_no_error(repo, convert):
    run = convert("{seconds: 0.5, steps: 4}")
    left = at_work(repo)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == launch.INTERRUPTED
    assert error(repo).startswith("interrupted") and not psutil.wait_procs(left, timeout=20)[1]


def test_they_end_when_their_launcher_is_killed(repo, convert):
    run = convert("{seconds: 20, steps: 5}")
    left = at_work(repo)
    run.kill()
    assert not psutil.wait_procs(left, timeout=20)[1]


def test_no_stage_depends_on_the_section_and_its_settings_are_checked(repo):
    stages = yaml.safe_load((Path(__file__).parents[3] / "dvc.yaml").read_text())["stages"]
    assert not [name for name, stage in stages.items() if any("launch" in each for each in stage["do"]["params"])]
    file = repo.root / "params.yaml"
    given = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(given | {"launch": {"processes": 2}}))
    assert launch.config(repo.root) == launch.LaunchConfig(processes=2)
    for wrong, message in (({"process": 2}, "process"), ({"nodes": 2}, "nodes is 2 and address None; expected")):
        file.write_text(yaml.safe_dump(given | {"launch": wrong}))
        with pytest.raises(T5Error, match=f"params.yaml: launch.*{message}"):
            launch.config(repo.root)


def test_so_many_accelerators_are_taken_as_can_share_the_batches(monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    recipe = {"lr": 1e-4, "batch_size": 4, "accumulate": 4}
    each = launch.LaunchConfig()
    for changes, number in (({}, 4), ({"accumulate": 16}, 8), ({"accumulate": 1, "mixup": 0.8}, 2), ({"steps": 0}, 8)):
        assert launch.number(each, {"freeze": {"train": recipe | changes}}) == number, changes
    assert (
        "using 4 of 8 accelerators: 8 processes cannot share freeze.train.batch_size 4 with" in capsys.readouterr().out
    )
    assert launch.number(each, {"evaluate": {"sampling": {"batch_size": 3}}}) == 8
    with pytest.raises(T5Error, match=r"3 processes cannot share calibrate.batch_size 4 .*set it to 2, for example"):
        launch.number(launch.LaunchConfig(processes=3), {"calibrate": {"lr": 1e-2, "batch_size": 4}})
    two = launch.LaunchConfig(nodes=2, address="gpu-a:29400")
    assert launch.pieces(two) == 1 and launch.pieces(dataclasses.replace(two, strategy="fsdp2")) == 16
    assert launch.number(two, {"freeze": {"train": recipe}}) == 2
    with pytest.raises(
        T5Error, match=r"16 processes on 2 nodes cannot share freeze.batch_size 3 .*change the batch sizes"
    ):
        launch.number(two, {"freeze": {"lr": 1e-2, "batch_size": 3}})
