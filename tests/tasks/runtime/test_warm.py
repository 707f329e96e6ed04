"""Stages that a process with imported libraries forks for: the same to whoever starts them, only sooner."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from flows.process import environment
from tasks.runtime import warm

LIBRARY = "open('imports', 'a').write('once\\n')"
PROBE = """
import os, sys, time
import library
try:
    print("to the other output", file=sys.stderr)
    print(os.getpid(), os.getcwd(), sys.argv[1:], os.environ["TOLD"], flush=True)
    if sys.argv[1] == "sleep":
        time.sleep(60)
except KeyboardInterrupt:
    print("checkpoint saved")
    sys.exit(130)
sys.exit({"well": 0, "badly": "what went wrong"}.get(sys.argv[1], 3))
"""


@pytest.fixture
def folder(tmp_path, request):
    """With a package `tasks` of one stage, `probe`, that imports a library."""
    for module in ("__init__", "runtime/__init__", "runtime/warm"):
        (tmp_path / f"tasks/{module}.py").parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(request.config.rootpath / f"tasks/{module}.py", tmp_path / f"tasks/{module}.py")
    (tmp_path / "tasks/probe.py").write_text(PROBE)
    (tmp_path / "library.py").write_text(LIBRARY)
    return tmp_path


@pytest.fixture
def variables(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with warm.serving(["library", "no_such_library"], environment({"PYTHONPATH": str(folder)})) as given:
        yield environment({**given, "TOLD": "passed on"})


def start(folder, variables, argument, *options):
    command = [sys.executable, *options, "-m", "tasks.probe", argument]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=variables, text=True, **pipes)


@pytest.mark.parametrize(
    ("argument", "status", "error"),
    [("well", 0, ""), ("badly", 1, "what went wrong\n"), ("otherwise", 3, "")],
)
def test_outputs_folder_environment_and_exit_status_are_those_of_the_command(
    folder, variables, argument, status, error
):
    process = start(folder, variables, argument)
    output, errors = process.communicate(timeout=60)
    pid, said = output.split(maxsplit=1)
    assert int(pid) != process.pid
    assert said == f"{folder} ['{argument}'] passed on\n"
    assert errors == f"to the other output\n{error}"
    assert process.returncode == status


def test_libraries_are_imported_once_and_our_own_code_by_every_stage(folder, variables):
    start(folder, variables, "well").communicate(timeout=60)
    start(folder, variables, "well", "-u").communicate(timeout=60)  # as launchers of several processes do
    (folder / "tasks/probe.py").write_text("import library; print('changed')")
    output, _ = start(folder, variables, "well").communicate(timeout=60)
    assert output == "changed\n"
    assert (folder / "imports").read_text() == "once\n"


def test_a_call_is_answered_before_the_last_library_is_imported(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "first.py").write_text("import select, sys; select.select([int(sys.argv[1])], [], [])")  # until it calls
    (folder / "last.py").write_text("import time; time.sleep(60)")
    with warm.serving(["first", "last"], environment({"PYTHONPATH": str(folder)})) as given:
        process = start(folder, environment({**given, "TOLD": "passed on"}), "well")
        output, _ = process.communicate(timeout=30)
    assert int(output.split()[0]) != process.pid and process.returncode == 0


def test_ctrl_c_reaches_the_work_and_its_last_words_the_reader(folder, variables):
    process = start(folder, variables, "sleep")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output == "checkpoint saved\n" and process.returncode == 130


def test_the_work_dies_with_the_command_that_waits_for_it(folder, variables):
    process = start(folder, variables, "sleep")
    worker = psutil.Process(int(process.stdout.readline().split()[0]))
    process.kill()
    assert psutil.wait_procs([worker], timeout=20)[0]
    process.communicate()


def test_work_that_is_killed_fails_the_command_with_a_reason(folder, variables):
    process = start(folder, variables, "sleep")
    os.kill(int(process.stdout.readline().split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "tasks.probe: its process was killed; if memory ran out, use a smaller batch_size" in errors


def test_without_the_process_a_stage_runs_by_itself(folder, monkeypatch):
    gone = {warm.ADDRESS: str(folder / "no-socket"), "PYTHONPATH": str(folder), "TOLD": "passed on"}
    process = start(folder, environment(gone), "well")
    output, _ = process.communicate(timeout=60)
    assert int(output.split()[0]) == process.pid and process.returncode == 0


def test_the_process_ends_with_the_flow_also_when_the_flow_is_killed(folder):
    flow = """
import os, time
from tasks.runtime import warm
with warm.serving([], os.environ) as given:
    print(given[warm.ADDRESS], flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", flow], cwd=folder, stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    [server] = psutil.Process(process.pid).children()
    process.kill()
    assert psutil.wait_procs([server], timeout=20)[0]
    assert not os.path.exists(os.path.dirname(address))
    process.communicate()
