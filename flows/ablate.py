"""The flow `ablate`: an ablation, from the weights to the tables, a Prefect task for every variant.

    python -m flows.ablate smoke

or in Python `from flows.ablate import ablate; ablate("smoke")`, or a deployment (prefect.yaml). Run again, it makes
what is missing. A variant that breaks leaves the others their turn.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import command, killed, outcome, server
from flows.process import environment, stream
from t5lib.utils import command_line
from t5lib.utils.errors import T5Error
from tasks import targets
from tasks.runtime import failures
from tasks.studies.ablation import names

LIBRARIES = targets.libraries({})  # of classifiers: what ablations compare
TASK = [sys.executable, "-m", "tasks.studies.ablation"]
PREFIX = "ablation: "  # of the command's own errors
KEPT = "finished variants are kept"
SHOWN = 15  # last lines of a broken command that its error shows


server.end_temporary_server_with_us()


@flow(name="ablate", flow_run_name="{name}", persist_result=False)
def ablate(name: str = "dinov2-fashion", seeds: list[int] | None = None, out: str | None = None) -> list[str]:
    """Run an ablation and write its tables; returns the files that hold them.

    Args:
        name: of a file in tasks/studies/ablation, or the path of a file, such as my.yaml.
        seeds: default: those of the ablation.
        out: where the results go, without a file ending; default: docs/results/ablation-NAME.

    Raises:
        T5Error: a slip in the settings, before any work; or what broke, after all else is done.
    """
    killed.sign_and_sweep(get_run_logger())
    try:
        with failures.in_words(Path.cwd(), lambda: KEPT), command.warmed(LIBRARIES) as variables:
            return _run(Path.cwd(), name, seeds, out or f"docs/results/ablation-{Path(name).stem}", variables)
    except T5Error as error:
        return outcome.failed(error, f"ablation {name}", KEPT)


def _run(root: Path, name: str, seeds: list[int] | None, out: str, variables: dict[str, str]) -> list[str]:
    plan = _plan(root, name, variables)
    seeds = seeds or plan["seeds"]
    variants = [unit["variant"] for unit in plan["units"]]
    get_run_logger().info(
        "%s: prepare → %d variants with seeds %s (%s) → tables; what finished with the same settings is skipped",
        *(plan["name"], len(variants), ", ".join(map(str, seeds)), ", ".join(variants)),
    )
    chosen = ["--seeds", *map(str, seeds)]
    _task("prepare")(str(root), ["prepare", name, *chosen], variables, return_state=True).result()
    problems = []
    for variant in variants:
        words = ["run", name, *chosen, "--out", f"{out}.json", "--only", variant]
        state = _task(variant)(str(root), words, variables, return_state=True)
        if state.is_failed():
            problems.append(f"{variant}: {state.message}")
    words = ["tables", f"{out}.json", "--out", out]
    files = _task("tables")(str(root), words, variables, return_state=True).result()
    _publish(root, plan["name"], files)
    if problems:
        raise T5Error("\n".join(problems))
    return files


def _publish(root: Path, name: str, files: list[str]) -> None:
    tables = [root / file for file in files if file.endswith(".md")]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in tables if file.is_file())
    places = {"files": ", ".join(f"`{root / file}`" for file in files)}
    outcome.publish(f"ablation-{name}", f"{text}\n\n{outcome.described({}, places)}", f"The tables of ablation {name}.")


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


def _plan(root: Path, name: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """The ablation, checked and resolved, in a process of its own, which loads torch."""
    run = subprocess.run([*TASK, "show", name], cwd=root, env=environment(variables), capture_output=True, text=True)
    if run.returncode:
        raise T5Error(run.stderr.strip().removeprefix(PREFIX))
    return json.loads(run.stdout)


def main() -> None:
    parser = command_line.parser("flows.ablate", str(__doc__))
    known = f"an ablation ({', '.join(names())}) or a file, such as my.yaml"
    parser.add_argument("name", nargs="?", default="dinov2-fashion", help=known)
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run (default: those of the ablation)")
    parser.add_argument("--out", help="where the results go, with no file ending (default: docs/results/ablation-NAME)")
    arguments = parser.parse_args()
    files = command.run(
        lambda: LIBRARIES,
        lambda variables: _plan(Path.cwd(), arguments.name, variables),
        lambda: ablate(arguments.name, arguments.seeds, arguments.out, return_state=True),
    )
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
