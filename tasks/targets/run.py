"""How a stage is run: `python -m tasks.convert dinov2-fashion`, or `run_stage` in process.

A stage is a module of tasks/ with the sections that it reads and what it does with a target:

    READS = ("convert",)

    def run(target: Target) -> dict:
        config = target.section()
        model = target.load("source")
        ...
        return {"new": 123}

    if __name__ == "__main__":
        main(run)

Neither DVC nor Prefect nor MLflow is needed to run one.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from t5lib.utils import processes
from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256
from tasks.runtime import command_line, launch, local_sources, nodes, warm
from tasks.runtime.failures import in_words
from tasks.runtime.params import read_target
from tasks.runtime.stage import Stage
from tasks.runtime.tracking import start_stage
from tasks.runtime.tracking.about import device, flatten
from tasks.targets import kind, resolve

HOW = (
    "Its settings are the target's in params.yaml; `python -m tasks.targets TARGET` prints them all, with defaults. "
    "`python -m flows.t5 TARGET` runs every stage, those that it needs first."
)


def run_stage(
    name: str, target: str, *, params: dict[str, Any] | None = None, root: Path | str = Path("."), track: bool = False
) -> dict[str, Any]:
    """Run stage `name` of `target` in this process and return its metrics.

    Args:
        params: replaces the target's section of params.yaml.
        track: record the run in MLflow.

    Raises:
        T5Error: disk, permission or memory stopped it, in words.
        Exception: what else the stage raises; either is also written to `data/scratch/<target>/<stage>.error.json`.
    """
    stage, run = _stage(name, target, params, Path(root))
    if not processes.leads():
        return _follow(stage, run)
    with in_words(stage.root, stage.kept), stage.alone():
        return _lead(stage, run, track)


def _stage(
    name: str, target: str, params: dict[str, Any] | None, root: Path
) -> tuple[Stage, Callable[[], dict[str, Any]]]:
    """The stage, and what it does."""
    settings = read_target(root, target) if params is None else params
    module, of_kind = import_module(f"tasks.{name}"), kind(settings)
    sections = {section: of_kind.SECTIONS[section] for section in module.READS}
    stage = Stage(name, target, settings=settings, sections=sections, root=root)
    return stage, lambda: module.run(of_kind(stage))


def _follow(stage: Stage, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Share the work of a stage that the first process makes."""
    try:
        with in_words(stage.root, stage.kept):
            processes.wait()
            return run()
    except BaseException as error:
        if not stage.fail(error):
            sys.exit(1)
        raise


def _lead(stage: Stage, run: Callable[[], dict[str, Any]], track: bool) -> dict[str, Any]:
    try:
        with in_words(stage.root, stage.kept):
            stage.begin()
            processes.wait()
            if track:
                stage.run_log = start_stage(stage.root, stage.target, stage.name, stage.settings)
            metrics = run()
            stage.succeed(metrics)
    except BaseException as error:
        own = stage.fail(error)
        stage.run_log.set_tags({"device": device()})
        stage.run_log.finish("KILLED" if own and isinstance(error, KeyboardInterrupt) else "FAILED")
        if not own:
            sys.exit(1)
        raise
    stage.run_log.log_metrics(metrics)
    stage.run_log.set_tags({"device": device(), "metrics_sha256": sha256(stage.metrics_file)})
    if stage.product:
        stage.run_log.register(stage.product)
    stage.run_log.finish()
    return metrics


def main(run: Callable[..., dict[str, Any]]) -> None:
    """The command line of the stage `run` is of: one argument, the target. Exit status 1 on error, 130 when stopped.

    A module that says TOGETHER = True is run in several processes (tasks/runtime/launch.py). Where a launcher started
    several for another stage, the first of them does it.
    """
    name = Path(run.__code__.co_filename).stem
    command = f"python -m tasks.{name} dinov2-fashion"
    parser = command_line.parser(f"tasks.{name}", f"{run.__globals__['__doc__']}\n\n    {command}\n\n{HOW}")
    command_line.add_target(parser)
    target = parser.parse_args().target
    for stop in (signal.SIGINT, signal.SIGTERM):  # also where a background shell made us ignore Ctrl-C
        signal.signal(stop, signal.default_int_handler)
    together, reads = run.__globals__.get("TOGETHER", False), run.__globals__["READS"]
    try:
        os.environ |= nodes.of_slurm(os.environ)
        joined = launch.joined()
        if joined and not _join(together):
            return
        number, config = 1, launch.config(Path("."))
        os.environ.setdefault(processes.STRATEGY, config.strategy)
        starts = together and not joined
        if processes.leads():
            # Check every setting and file, also those that later stages read, so that no work is lost to a mistake.
            settings = resolve(".", target)
            local_sources.check(Path("."), target, settings)
            if starts:
                number = launch.number(config, {section: settings[section] for section in reads})
        node = 0 if joined else nodes.own_number(config.nodes)
        if starts and (number > 1 or config.nodes > 1):
            _launch(name, target, number, node, config)
        elif node == 0:
            _do(name, target)
        else:
            print(f"{name}: only the first node runs this stage", flush=True)
    except T5Error as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(launch.INTERRUPTED)
    finally:
        for stop in (signal.SIGINT, signal.SIGTERM):  # otherwise Python would print a traceback while it exits
            signal.signal(stop, signal.SIG_DFL)


def _do(name: str, target: str) -> None:
    started = time.monotonic()
    metrics = run_stage(name, target, track=True)
    shown = [f"{key} {value:.4g}" for key, value in flatten(metrics).items() if isinstance(value, int | float)]
    print(f"{name} done in {time.monotonic() - started:.0f} s: {', '.join(shown[:6])}", flush=True)


def _join(together: bool) -> bool:
    """Become one of the processes that a launcher started; False where there is nothing to do for this one."""
    warm.end_with_launcher()
    if not processes.leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end)
        return together
    if not together:
        launch.leave()
    return True


def _launch(name: str, target: str, number: int, node: int, config: launch.LaunchConfig) -> None:
    """Run the stage in `number` processes on each node, and report one that is killed, which cannot do so itself."""
    print(f"{name}: {number} process{'es' * (number > 1)}", flush=True)
    try:
        work = f"{name} of {target} in {number} process{'es' * (number > 1)} a node"
        with nodes.met(node, config.nodes, config.address, work) as meeting:
            launch.start(f"tasks.{name}", [target], number, meeting)
    except T5Error as error:
        stage, _ = _stage(name, target, None, Path("."))
        stage.fail(error)
        raise
