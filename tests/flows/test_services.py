"""Server, worker and deployments in the background, as `make up` and `make down` drive them."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from small_deployments import DEPLOYMENTS, free_port

from flows import services
from t5lib.utils.errors import T5Error


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def repo(small_repo, unrecorded):
    """The small repository with a deployment, and nothing left running."""
    (small_repo.root / "prefect.yaml").write_text(DEPLOYMENTS)
    yield small_repo
    services.down(small_repo.root)


def processes(repo):
    return {name: (repo.root / f"data/prefect/t5-{name}.pid").read_text() for name in ("server", "worker")}


def joined(printed: str) -> str:
    """Without the line breaks that fit it into a terminal."""
    return " ".join(printed.split())


@pytest.mark.pipeline
@pytest.mark.xdist_group("services")
def test_a_deployment_runs_to_its_end_and_shows_the_stages_error(repo, port):
    services.up(repo.root, port)
    started = processes(repo)
    repo.set('{inner: "2"}', '{inner: "2", fail: "top-1 is 9.6, below the floor"}')
    run = repo.run("prefect", "deployment", "run", "t5/convert-vit", "--watch")
    assert run.returncode == 1, run.stdout
    assert repo.calls() == [1, 0, 0]
    assert "small failed in the stage fetch: top-1 is 9.6, below the floor" in joined(run.stdout)
    assert "Traceback" not in (repo.root / "data/prefect/worker.log").read_text()

    services.up(repo.root, port)
    assert processes(repo) == started
    services.down(repo.root)
    assert not any(psutil.pid_exists(int(pid)) for pid in started.values())
    assert sorted(path.suffix for path in (repo.root / "data/prefect").glob("*.pid")) == []
    assert not (repo.root / "data/prefect/profiles.toml").exists()


def test_a_pid_file_that_names_a_stranger_is_not_believed(tmp_path):
    (tmp_path / services.HOME).mkdir(parents=True)
    (tmp_path / services.HOME / "t5-worker.pid").write_text(f"{os.getpid()}\n")
    services.down(tmp_path)  # would end this test run
    assert not (tmp_path / services.HOME / "t5-worker.pid").exists()


def test_stopping_ends_children_too():
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess as s, sys; print(s.Popen(['sleep', '60']).pid, flush=True); input()"],
        stdin=-1,
        stdout=-1,
        text=True,
    )
    child = int(parent.stdout.readline())
    services._stop(psutil.Process(parent.pid), patience=0.5)
    parent.wait(5)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_pages_without_any_record_point_to_what_makes_one(tmp_path):
    with pytest.raises(T5Error, match="no run was recorded yet; `make demo` makes one"):
        services.ui(Path(tmp_path), 5000)
