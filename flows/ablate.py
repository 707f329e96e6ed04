"""The flow `ablate`: an ablation, from the weights to the tables, a Prefect task for every variant.

`python -m flows.ablate smoke`, or in Python `from flows.ablate import ablate; ablate("smoke")`, or a deployment
(prefect.yaml). Run again, it makes what is missing. A variant that breaks leaves the others their turn.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import server
from flows.process import environment, stream
from t5lib.utils.errors import T5Error
from tasks import targets
from tasks.runtime import failures, readiness, tracking, warm

LIBRARIES = targets.libraries({})  # of classifiers: what ablations compare
TASK = [sys.executable, "-m", "tasks.studies.ablation"]
PREFIX = "ablation: "  # of the command's own errors
KEPT = "finished variants are kept"
SHOWN = 15  # last lines of a broken command that its error shows


@flow(name="ablate", flow_run_name="{name}", persist_result=False)
def ablate(name: str = "dinov2-fashion", seeds: list[int] | None = None, out: str | None = None) -> list[str]:
    """Run an ablation and write its tables; returns the files that hold them.

    Args:
        name: of a file in tasks/studies/ablation, or the path of a file, such as my.yaml.
        seeds: default: those of the ablation.
        out: where the results go, without ending; default: docs/results/ablation-NAME.

    Raises:
        T5Error: a slip in the settings, before any work; or what broke, after all else is done.
    """
    server.sign_and_sweep(get_run_logger())
    # A returned state, not an exception, so that Prefect shows the message alone.
    try:
        with (
            failures.in_words(Path.cwd(), lambda: KEPT),
            warm.serving(LIBRARIES, environment(tracking.DEFAULTS)) as variables,
        ):
            return _run(Path.cwd(), name, seeds, out or f"docs/results/ablation-{Path(name).stem}", variables)
    except T5Error as error:
        return Failed(message=str(error), data=error)


def _run(root: Path, name: str, seeds: list[int] | None, out: str, variables: dict[str, str]) -> list[str]:
    plan = _plan(root, name, variables)
    seeds = seeds or plan["seeds"]
    variants = [unit["variant"] for unit in plan["units"]]
    get_run_logger().info(
        "%s: prepare → %d variants with seeds %s (%s) → tables; what is done with the same settings is skipped",
        *(plan["name"], len(variants), ", ".join(map(str, seeds)), ", ".join(variants)),
    )
    chosen = ["--seeds", *map(str, seeds)]
    _task("prepare")(str(root), ["prepare", name, *chosen], variables, return_state=True).result()
    problems = []
    for variant in variants:
        command = ["run", name, *chosen, "--out", f"{out}.json", "--only", variant]
        state = _task(variant)(str(root), command, variables, return_state=True)
        if state.is_failed():
            problems.append(f"{variant}: {state.message}")
    command = ["tables", f"{out}.json", "--out", out]
    files = _task("tables")(str(root), command, variables, return_state=True).result()
    if problems:
        raise T5Error("\n".join(problems))
    return files


def _task(name: str) -> Task:
    return task(run_command, name=name, task_run_name=name, cache_policy=NO_CACHE)


def run_command(root: str, arguments: list[str], variables: dict[str, str]) -> State:
    """Run `python -m tasks.studies.ablation ARGUMENTS` in `root`; the state carries its last lines.

    Args:
        variables: of its environment.
    """
    log, lines = get_run_logger(), []

    def on_line(line: str) -> None:
        lines.append(line)
        log.info(line)

    code = stream([*TASK, *arguments], on_line, cwd=Path(root), env=environment(variables))
    if code:
        own = [line for line in lines if line.startswith(PREFIX)] or lines[-SHOWN:]
        error = T5Error("\n".join(own).removeprefix(PREFIX) or f"ended with status {code}")
        return Failed(message=str(error), data=error)
    return Completed(message=lines[-1] if lines else "nothing to do", data=lines)


def _plan(root: Path, name: str, variables: dict[str, str]) -> dict[str, Any]:
    """The ablation, checked and resolved, in a process of its own, which loads torch."""
    run = subprocess.run([*TASK, "show", name], cwd=root, env=environment(variables), capture_output=True, text=True)
    if run.returncode:
        raise T5Error(run.stderr.strip().removeprefix(PREFIX))
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.ablate", description="Run an ablation, to its tables.")
    names = "an ablation of tasks/studies/ablation, or a file, such as my.yaml"
    parser.add_argument("name", nargs="?", default="dinov2-fashion", help=names)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the ablation")
    parser.add_argument("--out", help="where the results go, without ending")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell made us ignore Ctrl-C
    try:
        readiness.check_disk(Path.cwd())
        print(*ablate(arguments.name, arguments.seeds, arguments.out), sep="\n")
    except T5Error as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
