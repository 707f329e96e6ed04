"""Two folders stand for two machines: a flow in one, whose stage `convert` a worker in the other runs.

One Prefect server, a work pool for each folder, one MLflow server, and a DVC remote between them.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from small_deployments import DEPLOYMENTS, free_port
from tracking_server import tracking_server

from flows import services
from tests.conftest import SmallRepo

pytestmark = [pytest.mark.pipeline, pytest.mark.slow, pytest.mark.xdist_group("services")]
FLOW = """\
from flows import elsewhere
from flows.t5 import t5
from tasks import targets
elsewhere.LOST, elsewhere.POLL = 2, 0.5
targets._LIBRARIES = {"classifier": ()}
t5("small", {"convert": "gpu"})
"""


@pytest.fixture(scope="module")
def here(make_small_repo, tmp_path_factory, empty_mlflow):
    """The folder of the flow; the servers that both speak to are named in the environment."""
    place = tmp_path_factory.mktemp("machines")
    repo = make_small_repo(place / "here")
    (repo.root / "prefect.yaml").write_text(DEPLOYMENTS)
    repo.run("dvc", "remote", "add", "--default", "team", str(place / "remote"))
    repo.git("add", "-A")
    repo.git("commit", "-qm", "two machines")
    port = free_port()
    with (
        tracking_server(place, empty_mlflow / "mlflow.db") as (address, process),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLFLOW_TRACKING_URI", address)
        patch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
        patch.setenv("PREFECT_WORKER_HEARTBEAT_SECONDS", "1")
        repo.mlflow = process
        services.up(repo.root, port)
        yield repo
        services.down(repo.root)


@pytest.fixture(scope="module")
def there(here):
    root = here.root.with_name("there")
    here.run("git", "clone", "-q", str(here.root), str(root))
    shutil.copy(here.root / "prefect.yaml", root)
    return SmallRepo(root)


@contextmanager
def serving(there: SmallRepo) -> Iterator[psutil.Process]:
    """The worker there, serving the pool."""
    log = (there.root / "worker.log").open("w+")
    command = [sys.executable, "-m", "flows.services", "work", "--pool", "gpu"]
    process = subprocess.Popen(command, cwd=there.root, stdout=log, stderr=subprocess.STDOUT)
    until = time.monotonic() + 90
    while "started!" not in (there.root / "worker.log").read_text():
        assert process.poll() is None and time.monotonic() < until, (there.root / "worker.log").read_text()
        time.sleep(0.2)
    yield psutil.Process(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(60)


@pytest.fixture(scope="module")
def worker(there):
    with serving(there) as process:
        yield process


def flow(here) -> subprocess.CompletedProcess:
    return here.run(sys.executable, "-c", FLOW)


def test_a_stage_runs_on_the_other_machine_and_its_result_is_known_on_both(here, there, worker):
    words = ("t5/convert-vit", "--watch", "--param", 'on={"convert": "gpu"}')
    run = here.run("prefect", "deployment", "run", *words)
    assert run.returncode == 0, run.stdout
    assert (here.calls(), there.calls()) == ([1, 0, 1], [0, 1, 0])
    assert (here.root / "data/out/small/convert/result.txt").read_text() == "swiglu2"
    recorded = {run.data.tags["stage"]: run for run in here.recorded()}
    assert set(recorded) == {"flow", "fetch", "convert", "evaluate"}
    assert recorded["convert"].data.tags["mlflow.parentRunId"] == recorded["flow"].info.run_id
    assert json.loads(here.run("dvc", "status", "--json").stdout) == {}
    again = flow(here)
    assert again.returncode == 0, again.stderr
    assert (here.calls(), there.calls()) == ([1, 0, 1], [0, 1, 0])


def test_a_machine_with_other_code_or_settings_refuses_before_any_work(here, there, worker):
    here.set("inner: swiglu", "inner: two_layer")
    run = flow(here)
    assert run.returncode == 1
    assert "has other code or settings than the folder of the flow" in run.stdout + run.stderr
    here.set("inner: two_layer", "inner: swiglu")
    assert there.calls() == [0, 1, 0]


def test_a_lost_machine_is_told_and_the_next_run_goes_on(here, there, worker):
    for repo in (here, there):
        repo.set("inner: swiglu", "seconds: 25, inner: swiglu")
    running = subprocess.Popen(
        [sys.executable, "-c", FLOW], cwd=here.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 90
    while there.calls() != [0, 2, 0]:
        assert time.monotonic() < until
        time.sleep(0.2)
    for process in [worker, *worker.children(recursive=True)]:
        process.kill()
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 1 and "the worker of the pool 'gpu' is lost. Start it again on its machine" in said, (
        said
    )
    for repo in (here, there):
        repo.set("seconds: 25, ", "seconds: 0, ")
    with serving(there):
        again = flow(here)
    assert again.returncode == 0, again.stdout
    assert (here.calls()[1], there.calls()[1]) == (0, 3)
