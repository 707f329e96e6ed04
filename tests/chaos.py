"""What `make test` has no time for: kills at random moments, several at once. `python -m tests.chaos [KILLS [ATTACK]]`.

Every attack is made on the small repository of tests/conftest; its stage `convert` takes steps and goes on from the
last. Prints a line an attack and ends with status 1 when anything was lost or left behind.
"""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

from flows import dvc_locks
from tests.conftest import ROOT, SmallRepo, made_repo

FLOW = ("-c", "from flows.t5 import t5; t5('small')")
STEPS, STEP_SECONDS = 150, 0.1
CONVERT = f"""
import time

from t5lib.utils.files import write_text
from tasks.targets.run import main

READS = ("convert",)

def run(target):
    stage = target.stage
    config = stage.params(target.SECTIONS["convert"])
    stage.input("fetch")
    checkpoint = stage.resume_dir() / "checkpoint"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(done, {STEPS}):
        time.sleep({STEP_SECONDS})
        with open("data/steps", "a") as steps:
            steps.write(f"{{step}}\\n")
        write_text(checkpoint, str(step + 1))
    (stage.out / "result.txt").write_text(config.inner)
    return {{"score": {STEPS}}}

if __name__ == "__main__":
    main(run)
"""


class Attack:
    """A repository, and the processes that are started in it: those whose environment has `mark`."""

    def __init__(self, folder: Path):
        self.repo: SmallRepo = made_repo(folder / "repo")
        (self.repo.root / "tasks/convert.py").write_text(CONVERT)
        (self.repo.root / "data").mkdir()  # as in every clone
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, "T5_CHAOS": self.mark, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.log = folder / "log"

    def start(self, *command: str) -> subprocess.Popen:
        with self.log.open("a") as log:
            return subprocess.Popen(command, cwd=self.repo.root, env=self.env, stdout=log, stderr=log)

    def alive(self) -> list[psutil.Process]:
        marked = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("T5_CHAOS") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    marked.append(process)
            except psutil.Error:
                continue
        return marked

    def orphans(self, patience: float) -> list[str]:
        """The processes that are left after so many seconds; they are ended."""
        until = time.monotonic() + patience
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.2)
        names = [" ".join(process.cmdline())[:100] for process in left]
        for process in left:
            process.kill()
        return names

    def problems(self, kills: int) -> list[str]:
        """What is wrong after a last run that was left in peace."""
        data, problems = self.repo.root / "data", []
        repeated = len((data / "steps").read_text().splitlines()) - STEPS
        if repeated > kills:  # a kill may cost the one step that was being noted
            problems.append(f"{repeated} steps done twice in {kills} kills")
        left = [str(path) for path in data.rglob(".*") if path.is_relative_to(data / "out")]
        scratch = [path for path in (data / "scratch").rglob("*") if path.is_file()]
        left += [str(path) for path in scratch if path.suffix not in (".lock", ".log")]  # .log: all that a stage said
        problems += [f"left behind: {path}" for path in left]
        for name, table in (
            ("mlflow/mlflow.db", "runs"),
            ("prefect/prefect.db", "flow_run"),
            ("prefect/prefect.db", "task_run"),
        ):
            problems += [f"{count} of {table} seem to run" for count in [running(data / name, table)] if count]
        return problems


def running(database: Path, table: str) -> int:
    if not database.exists():
        return 0
    column = "status" if table == "runs" else "state_type"
    with sqlite3.connect(database) as connection:
        return connection.execute(f"select count(*) from {table} where {column} = 'RUNNING'").fetchone()[0]


def kill_the_flow(attack: Attack, kills: int) -> list[str]:
    """Everything that it started ends, and the next one goes on."""
    problems = []
    for _ in range(kills):
        flow = attack.start(sys.executable, *FLOW)
        time.sleep(random.uniform(1, 60))
        flow.kill()
        flow.wait()
        problems += [f"outlived its flow: {name}" for name in attack.orphans(40)]
    if attack.start(sys.executable, *FLOW).wait():
        problems.append("the last run failed")
    return problems + attack.problems(kills)


def kill_a_part(attack: Attack, kills: int, part: str) -> list[str]:
    """`part` of a plain `dvc repro`, DVC itself or the stage; an orphaned stage is waited for.

    DVC killed while it writes its list of who uses what refuses all that follows; flows mend that, and so is done here.
    """
    for _ in range(kills):
        dvc_locks.mend(attack.repo.root)
        attack.start("dvc", "repro", "evaluate@small")
        time.sleep(random.uniform(2, 6))
        for process in attack.alive():
            if part in " ".join(process.cmdline()[1:]):
                process.kill()
                break
        if part != "dvc":
            attack.orphans(30)
    dvc_locks.mend(attack.repo.root)
    while subprocess.run(
        ["dvc", "repro", "evaluate@small"], cwd=attack.repo.root, env=attack.env, capture_output=True
    ).returncode:
        if not attack.alive():
            return ["the last run failed"]
        time.sleep(1)
    attack.start("dvc", "repro", "evaluate@small").wait()  # sweeps what the first one finished
    return [problem for problem in attack.problems(kills) if "evaluate" not in problem]


def many_at_once(attack: Attack, count: int, *command: str) -> list[str]:
    processes = [attack.start(sys.executable, *command) for _ in range(count)]
    failed = [process.returncode for process in processes if process.wait()]
    problems = [f"ended with {failed}"] if failed else []
    if "is in use by process" not in (log := attack.log.read_text()):
        problems.append("nobody said who was at work")
    if "rwlock" in log:
        problems.append("DVC's advice was shown")
    return problems


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    signal.signal(signal.SIGINT, signal.default_int_handler)
    attacks = {
        f"{kills} kills of the stage": lambda attack: kill_a_part(attack, kills, "tasks."),
        f"{kills} kills of DVC": lambda attack: kill_a_part(attack, kills, "dvc"),
        "4 of one stage at once": lambda attack: many_at_once(attack, 4, "-m", "tasks.fetch", "small"),
        "2 flows of one target at once": lambda attack: many_at_once(attack, 2, *FLOW),
        f"{kills} kills of the flow": lambda attack: kill_the_flow(attack, kills),
    }
    bad, chosen = 0, " ".join(sys.argv[2:])
    for name, attack in attacks.items():
        if chosen not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
            problems = attack(made := Attack(Path(folder)))
            if problems:
                bad += 1
                print(made.log.read_text()[-5000:])
        print(f"{name}: {'; '.join(problems) or 'nothing lost, nothing left'}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
