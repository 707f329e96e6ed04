"""What the studies share: command lines, a folder to work in, seeds, means with spreads, and one pool of processes."""

import argparse
import contextlib
import gc
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.runtime import command_line
from tasks.runtime.params import add_changes as add_changes

J = TypeVar("J")  # a job
R = TypeVar("R")  # what comes of it

MADE = ("out", "scratch", "mlflow", "prefect", "cache")  # folders of data/ that runs fill
THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")  # torch reads them when it is loaded
LOGARITHMIC = 5  # times the smallest value
PATIENCE = 20.0  # seconds that an interrupted job may take to save a checkpoint; a flow waits 25 before it insists


# Command lines.


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The command line of the study `tasks.studies.<name>`, which `doc` describes, with an example."""
    return command_line.parser(f"tasks.studies.{name}", doc)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes to run at once; they share the cards of this machine"
    )


@contextlib.contextmanager
def reported(name: str) -> Iterator[None]:
    """End the program with a T5Error's message and status 1, or with status 130 when it is interrupted."""
    stops = (signal.SIGINT, signal.SIGTERM)  # also where a background shell made us ignore Ctrl-C
    before = {stop: signal.signal(stop, signal.default_int_handler) for stop in stops}
    try:
        yield
    except T5Error as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


# Settings, folders and results.


def stages_of(root: Path, last: str | None = None) -> list[str]:
    """The stages in the order of dvc.yaml, in which each comes after those that it needs; up to `last`, or all."""
    stages = list(yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    return stages[: stages.index(last) + 1] if last else stages


def with_seed(settings: Any, seed: int) -> Any:
    """`settings` with the value of every key named "seed" replaced."""
    if not isinstance(settings, dict):
        return settings
    return {key: seed if key == "seed" else with_seed(value, seed) for key, value in settings.items()}


def checksum(value: Any) -> str:
    """Checksum of plain values; it does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def workspace(root: Path) -> Path:
    """A folder that looks like the repository to a stage: its own outputs, the repository's images and models."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    for folder in Path("data").glob("*"):
        link = root / "data" / folder.name
        if folder.is_dir() and folder.name not in MADE and not link.exists():
            link.symlink_to(folder.resolve())
    return root


def load_or_make(file: Path, make: Callable[[], Any]) -> Any:
    """The content of the JSON file `file`, which is made and written first if it is not there."""
    if not file.is_file():
        write_json(file, make())
    return read_json(file)


def machine() -> dict[str, str]:
    """What figures were measured on: {"device", "torch"}."""
    import torch

    from t5lib.benchmarks.timing import describe_device
    from tasks.targets.base import device

    return {"device": describe_device(device()), "torch": torch.__version__}


def clean_up() -> None:
    """Forget what was compiled, and give back the memory of a GPU that gone models held.

    Every stage compiles new modules; without this torch soon gives up and runs them uncompiled.
    """
    import torch

    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and to import it takes ten seconds
        torch.compiler.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def plus_minus(spread: dict[str, float], digits: int = 2) -> str:
    return f"{spread['mean']:.{digits}f} ± {spread['std']:.{digits}f}"


def measured_on(models: dict[str, dict[str, Any]]) -> str:
    """What the scores of models (of the stage `evaluate`) are of, as a sentence without its full stop."""
    score = models["source"]
    if "generated" not in score:
        return f"Scores on {score['n']:,} validation images"
    return (
        f"{score['generated']:,} images a model, the same prompts and noise for all, beside {score['real']:,} "
        f"{score.get('reference', 'real ones')}; features: {score['extractor']}"
    )


def heading(score: tuple[str, str, int]) -> str:
    """The heading of a column, from an entry of t5lib.report.score_table.METRICS."""
    return f"{score[0]} {'↓' if score[1] == 'lower' else '↑'}"


def needs_logarithm(interval: Sequence[float], better: str) -> bool:
    """Whether values from the one end to the other are drawn on a logarithmic axis: distances far apart."""
    low, high = interval
    return better == "lower" and high > LOGARITHMIC * low > 0


# Processes.


@dataclass(frozen=True)
class Outcome(Generic[J, R]):
    """What became of a job: its `result`, or the `problem` that ended it (a message, or the traceback of a bug)."""

    job: J
    result: R | None = None
    problem: str | None = None

    @property
    def last_words(self) -> str:
        """The problem in a line."""
        return (self.problem or "").strip().splitlines()[-1] if self.problem else ""


def run_jobs(
    function: Callable[[J], R],
    jobs: Sequence[J],
    at_once: int = 1,
    *,
    until: float = math.inf,
    logs: Path | None = None,
) -> Iterator[Outcome[J, R]]:
    """Do the jobs in order, several at once, and yield the outcome of each as soon as it ends.

    A job that fails costs itself alone, even when it takes its process with it. With `at_once` 1 they are done in this
    process; otherwise each process sees one card (cards are dealt round robin) and its share of the CPU's threads.

    Args:
        function: of a module, so that other processes find it.
        until: a time.time() after which no job is begun. Those that were not are not yielded.
        logs: a folder for the output of each process; by default all write where this one does.
    """
    if at_once == 1:
        yield from _one_by_one(function, jobs, until)
    else:
        yield from _side_by_side(function, jobs, at_once, until, logs)


def _one_by_one(function: Callable[[J], R], jobs: Sequence[J], until: float) -> Iterator[Outcome[J, R]]:
    for job in jobs:
        if time.time() > until:
            return
        yield Outcome(job, *_attempt(function, job))


def _side_by_side(
    function: Callable[[J], R], jobs: Sequence[J], at_once: int, until: float, logs: Path | None
) -> Iterator[Outcome[J, R]]:
    todo, busy = deque(jobs), {}
    idle = _workers(min(at_once, len(jobs)), at_once, logs)
    every = list(idle)
    try:
        while True:
            while todo and idle and time.time() <= until:
                worker, job = idle.popleft(), todo.popleft()
                busy[worker.begin(function, job)] = worker, job
            if not busy:
                return
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                worker, job = busy.pop(future)
                outcome: Outcome[J, R] = worker.outcome(future, job)
                idle.append(worker)
                yield outcome
    finally:
        _end(every, busy)


def _attempt(function: Callable[[J], R], job: J) -> tuple[R | None, str | None]:
    """The result, and the problem if there was one."""
    try:
        return function(job), None
    except Exception as error:
        return None, str(error) if isinstance(error, T5Error) else traceback.format_exc()


def cards() -> list[str]:
    """The cards that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


class _Worker:
    """A process for one job at a time. It is started with the first, and anew after one that failed.

    Each has a pool of its own, so that a process that dies breaks no other's.

    Args:
        environment: variables of the process, from its very start.
        log: where its output goes; None for where this process writes.
    """

    def __init__(self, environment: dict[str, str], log: Path | None):
        self.environment, self.log = environment, log
        self.pool: ProcessPoolExecutor | None = None
        self.process: Any = None

    def begin(self, function: Callable[[J], R], job: J) -> Future:
        if self.pool is not None and not self.process.is_alive():
            self.kill()
        if self.pool is None:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self.pool = ProcessPoolExecutor(1, context, initializer=_begin_worker, initargs=(self.log,))
        with _variables(self.environment):  # the process is started here, by the first job
            future = self.pool.submit(_attempt_in_worker, function, job)
        [self.process] = self.pool._processes.values()
        return future

    def outcome(self, future: Future, job: J) -> Outcome[J, R]:
        try:
            result, problem = future.result()
        except BrokenProcessPool:
            self.process.join()
            while self.process.exitcode is None:  # the pool waits for it too, and may be told first
                time.sleep(0.01)
            see = f"; see {self.log}" if self.log else ""
            result, problem = None, f"its process ended with status {self.process.exitcode}{see}"
        except Exception as error:  # the job or its result cannot be sent to another process
            result, problem = None, f"{type(error).__name__}: {error}"
        if problem is not None:
            self.kill()  # a broken CUDA context would break whatever comes next
        return Outcome(job, result, problem)

    def close(self) -> None:
        """Let an idle process end."""
        if self.pool is not None:
            self.pool.shutdown()

    def kill(self) -> None:
        if self.pool is not None:
            self.process.kill()
            self.pool.shutdown()
            self.pool = None


def _workers(count: int, at_once: int, logs: Path | None) -> deque[_Worker]:
    """Each with the next card of all that are seen, and threads for `at_once` of its kind."""
    threads = str(max(1, (os.cpu_count() or 1) // at_once))  # or each would start as many as there are cores
    shared = {name: threads for name in THREADS if name not in os.environ}
    places = [{"CUDA_VISIBLE_DEVICES": card} for card in cards()] or [{}]
    return deque(
        _Worker(shared | own, logs and logs / f"worker-{number}.log")
        for number, own in enumerate(islice(cycle(places), count))
    )


def _end(workers: list[_Worker], busy: dict[Future, tuple[_Worker, Any]]) -> None:
    """Let idle processes end. When some are at work, we were interrupted: those may save a checkpoint, then all go."""
    if not busy:
        for worker in workers:
            worker.close()
        return
    try:
        for worker, _ in busy.values():
            worker.process.terminate()
        wait(busy, timeout=PATIENCE)
    finally:
        for worker in workers:
            worker.kill()


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Within, the environment has these."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin_worker(log: Path | None) -> None:
    """The first thing that a process does. Ctrl-C reaches all at once, so its owner alone passes it on, as SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")


def _end_with_owner() -> None:
    if owner := multiprocessing.parent_process():
        owner.join()
    os._exit(1)


def _attempt_in_worker(function: Callable[[J], R], job: J) -> tuple[R | None, str | None]:
    try:
        result, problem = _attempt(function, job)
    except KeyboardInterrupt:
        return None, "it was interrupted"
    if problem is not None:
        print(problem, file=sys.stderr, flush=True)
    return result, problem
