"""Several processes that share one device and take tasks one by one; one that dies is replaced.

A task is ("source", seed) or ("unit", (variant, seeds)). Everything a task makes is on disk when it is done.
"""

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json
from tasks.studies.ablation.definition import Plan

Task = tuple[str, Any]
Report = Callable[[Task, str | None], None]  # a finished task, and its traceback where it broke


class Crew:
    """`jobs` processes, or this one alone where jobs is 1.

    Args:
        commit: what is recorded as the code's version.
        hand: what does the tasks in each process.
    """

    def __init__(self, plan: Plan, work: Path, jobs: int, commit: str, hand: "type[Hand] | None" = None):
        self.arguments, self.jobs, self.hand = (plan, work, commit, jobs), jobs, hand or Hand
        self.workers: dict[Connection, _Member] = {}
        self._here: Hand | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_) -> None:
        for member in self.workers.values():
            member.stop()

    def do(self, tasks: Iterable[Task], report: Report, go_on: Callable[[], bool] = lambda: True) -> list[Task]:
        """Do the tasks in order, as many at once as there are jobs; returns those not begun when `go_on` said no."""
        todo = list(tasks)
        return self._alone(todo, report, go_on) if self.jobs == 1 else self._together(todo, report, go_on)

    def _alone(self, todo: list[Task], report: Report, go_on: Callable[[], bool]) -> list[Task]:
        while todo and go_on():
            self._here = self._here or self.hand(*self.arguments)
            task = todo.pop(0)
            report(task, self._here.attempt(task))
        return todo

    def _together(self, todo: list[Task], report: Report, go_on: Callable[[], bool]) -> list[Task]:
        while True:
            while todo and len(self._busy()) < self.jobs and go_on():
                self._idle().give(todo.pop(0))
            if not self._busy():
                return todo
            for connection in wait([member.connection for member in self._busy()]):
                member = self.workers[connection]
                task, problem = member.take()
                if problem is not None:
                    member.stop()  # a broken CUDA context would break whatever comes next
                    del self.workers[connection]
                report(task, problem)

    def _busy(self) -> list["_Member"]:
        return [member for member in self.workers.values() if member.task is not None]

    def _idle(self) -> "_Member":
        for member in self.workers.values():
            if member.task is None:
                return member
        member = _Member(self.hand, self.arguments, f"worker-{len(self.workers)}")
        self.workers[member.connection] = member
        return member


class _Member:
    """One process of a crew, as its owner sees it."""

    def __init__(self, hand: "type[Hand]", arguments: tuple, name: str):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, hand, arguments, name), name=name, daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # it died; take() says so
            self.connection.send(task)

    def take(self) -> tuple[Task, str | None]:
        """The finished task and its problem, if it had one. Blocks until there is an answer, or the process is dead."""
        task, self.task = self.task, None
        try:
            return task, self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return task, f"its process ended with status {self.process.exitcode}; see its log"

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


class Hand:
    """Does tasks in the process it lives in. The lab is set up with the first one."""

    def __init__(self, plan: Plan, work: Path, commit: str, jobs: int):
        self.plan, self.work, self.commit, self.shared_card = plan, work, commit, jobs > 1
        self._lab: Any = None

    def attempt(self, task: Task) -> str | None:
        """Do it; the traceback of whatever broke, else None."""
        try:
            self._do(*task)
        except Exception as error:
            traceback.print_exc()
            return str(error) if isinstance(error, T5Error) else traceback.format_exc()
        return None

    def _do(self, kind: str, what: Any) -> None:
        import torch

        from tasks.studies.ablation import variant as units
        from tasks.studies.ablation.context import Lab

        self._lab = self._lab or Lab(self.plan, self.work)
        if kind == "source":
            self._lab.make_source(what)
            return
        variant, seeds = what
        unit = self.plan.unit(variant)
        try:
            for seed in seeds:
                result = units.run(unit, seed, self._lab, commit=self.commit, shared_card=self.shared_card)
                write_json(result_file(self.work, variant, seed), result)
                print(f"{variant}, seed {seed}: done", flush=True)
        finally:
            torch.compiler.reset()  # the next variant is other code; seeds of one share theirs
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the others on this card can use it


def result_file(work: Path, variant: str, seed: int) -> Path:
    return work / f"results/{variant}--seed-{seed}.json"


def _serve(connection: Connection, kind: type[Hand], arguments: tuple, name: str) -> None:
    """What a process of the crew does: tasks, until its owner is gone. Its output goes to a log of its own."""
    threads = max(1, (os.cpu_count() or 1) // arguments[-1])  # or all would start as many as there are cores
    for variable in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(variable, str(threads))  # torch is not loaded yet
    log = arguments[1] / f"logs/{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    hand = kind(*arguments)
    try:
        while True:
            connection.send(hand.attempt(connection.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
