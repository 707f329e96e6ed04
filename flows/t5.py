"""The flow `t5`: one target, from fetched weights to the report, a Prefect task for every DVC stage.

    python -m flows.t5 dinov2-fashion

or in Python `from flows.t5 import t5; t5("dinov2-fashion")`, or a deployment (prefect.yaml). Without a Prefect server
one is started for as long as the flow runs. If it is run again, it resumes where it stopped.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import command, dvc_locks, elsewhere, graph, killed, outcome, server
from flows.outcome import StageError
from flows.process import environment, stream
from t5lib.utils.errors import T5Error, without_secrets
from t5lib.utils.files import read_json
from t5lib.utils.locks import exclusive
from tasks import targets
from tasks.runtime import command_line, failures, params, tracking
from tasks.runtime.stage import remove_recorded
from tasks.runtime.tracking import about
from tasks.targets.diffusers_folder import NOTE

# What DVC and the loading of pipelines say that a reader of the log need not know.
DVC_NOISE = re.compile(
    r"Running stage |> python -m |(Updating|Generating) lock file|To track the changes|\tgit add "
    r"|Loading (weights|pipeline components|checkpoint shards)|\s*deprecate\(|.*FutureWarning: `torch_dtype`"
    r"|To enable auto staging|WARNING: Process '.* Auto removed it from the lock file|WARNING: .* is empty"
    r"|\tdvc config |Use `dvc push`|Data and pipelines are up to date"
)
DVC_SKIPPED = re.compile(r"Stage '.*' (didn't change, skipping|is cached - skipping run)")
STAGE_ENDED = re.compile(r"failed to run: .*, exited with (?P<status>-?\d+)$")
HEADLINES = ("evaluate", "benchmark")  # the stages whose metrics are shown with the whole run
RETRY_AFTER_SECONDS = [5, 30]
KEPT = "finished stages are kept"


server.end_temporary_server_with_us()


def _retryable(_task: Any, _run: Any, state: State) -> bool:
    return getattr(state.data, "retryable", False)


@flow(name="t5", flow_run_name="{target}", persist_result=False)
def t5(target: str = "dinov2-fashion", on: dict[str, str] | None = None) -> dict[str, Any]:
    """Build a target of params.yaml and return its headline metrics, {"evaluate": ..., "benchmark": ...}.

    Stages whose inputs, code and settings did not change are not run again. A target that is not listed under
    `enabled` is added there.

    Args:
        target: a section of `targets` in params.yaml, such as dinov2-fashion-quick, deit-tiny or sd35-micro.
        on: stages that run on another machine, each with the work pool of that machine, such as {"finetune": "gpu"}.

    Raises:
        StageError: with the message of the stage that failed.
        T5Error: unknown target, a setting that does not fit, or this is not the repository's folder.
    """
    root = Path.cwd()
    try:
        with failures.in_words(root, lambda: KEPT):
            return _build(root, target, on or {})
    except T5Error as error:
        return outcome.failed(error, target, KEPT)


def _build(root: Path, target: str, pools: dict[str, str]) -> dict[str, Any]:
    log = get_run_logger()
    libraries = targets.libraries(params.read_target(root, target))
    killed.sign_and_sweep(log)
    with exclusive(root / f"data/scratch/{target}/flow.lock", f"target {target}", log.info):
        with command.warmed(libraries) as variables:
            return _built(root, target, variables, pools)


def _built(root: Path, target: str, variables: dict[str, str], pools: dict[str, str]) -> dict[str, Any]:
    """What `t5` returns; stages get `variables` in their environment."""
    log = get_run_logger()
    settings = _checked_settings(root, target, variables)
    if params.enable(root, target):
        log.warning("params.yaml: added '%s' to `enabled`; plain `dvc repro` builds it from now on", target)
    names = graph.stages(root, target)
    elsewhere.check(names, pools)
    log.info("%s: %s; unchanged stages are skipped", target, " → ".join(names))
    if takes := params.takes(root, target):
        log.info("Built from scratch, it takes %s", takes)
    run = tracking.start_flow(root, target, settings, names)
    try:
        for name in names:
            if name in pools:
                run_there = _task(name, elsewhere.run_stage)
                run_there(str(root), name, target, pools[name], run.id or "", return_state=True).result()
            else:
                recorded = variables | {tracking.PARENT_VARIABLE: run.id or ""}
                _task(name, run_stage)(str(root), name, target, recorded, return_state=True).result()
            run.adopt_stage(root, target, name, settings)
        headlines = {name: read_json(root / f"data/out/{target}/{name}.json") for name in HEADLINES if name in names}
        run.log_metrics(headlines)
        run.log_images(root / f"data/out/{target}/shards", settings.get("shards") or {})
        run.describe(root / f"data/out/{target}")
        _publish(root, target, headlines, run.id)
    except BaseException as error:
        run.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.finish()
    return headlines


def _publish(root: Path, target: str, headlines: dict[str, Any], run_id: str | None) -> None:
    """The report's summary, or the figures where the target has no report, and where everything is."""
    summary = root / f"data/out/{target}/report/summary.md"
    places = {"folder": f"`{root / 'data/out' / target}`"}
    if run_id:
        server = os.environ.get("MLFLOW_TRACKING_URI")
        page = f"{without_secrets(server) if server else 'http://127.0.0.1:5000'}/#/runs/{run_id}"
        places["MLflow run"] = page if server else f"{page} after `make ui`"
    if not summary.is_file():
        figures = about.flatten(headlines)
        first = ", ".join(f"{name} {value}" for name, value in figures.items())
        outcome.publish(target, outcome.described(figures, places), f"{target} is built: {first}.")
        return
    places = {"report": f"`{summary.with_name('report.html')}`", **places}
    text = summary.read_text(encoding="utf-8")
    sentence = next((line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")), target)
    outcome.publish(target, f"{text}\n{outcome.described({}, places)}", sentence)


def _task(name: str, run: Callable[..., State]) -> Task:
    retries = {"retries": len(RETRY_AFTER_SECONDS), "retry_delay_seconds": RETRY_AFTER_SECONDS}
    retries |= {"retry_condition_fn": _retryable}
    return task(run, name=name, task_run_name="{name}", cache_policy=NO_CACHE, **(retries if name == "fetch" else {}))


def run_stage(root: str, name: str, target: str, variables: dict[str, str]) -> State:
    """Bring one stage up to date with DVC. A Completed state says whether anything had to be done."""
    log, lines, skipped = get_run_logger(), [], False
    error_file = Path(root) / f"data/scratch/{target}/{name}.error.json"
    error_file.unlink(missing_ok=True)
    whole = outcome.WholeLog(error_file.with_name(f"{name}.log"))

    def on_line(line: str) -> None:
        nonlocal skipped
        whole.add(line)
        if DVC_SKIPPED.match(line):
            skipped = True
        elif not DVC_NOISE.match(line):
            lines.append(line)
            if not _told_later(line, name, error_file):
                log.info(line)

    repro = ["dvc", "--wait-for-lock", "repro", "-s", f"{name}@{target}"]
    while code := stream(repro, on_line, cwd=Path(root), env=environment(variables)):
        if not dvc_locks.settled(Path(root), lines, log.info):
            break
        lines.clear()
    remove_recorded(Path(root), target)
    if code:
        error = _stage_error(name, error_file, lines, code)
        error.log = whole.path
        return Failed(message=str(error), data=error)
    if skipped:
        log.info("nothing changed: results of an earlier run")
    return Completed(message="nothing changed" if skipped else "done", data=None)


def _told_later(line: str, name: str, error_file: Path) -> bool:
    """Whether a line is of the error that `_stage_error` makes, which the flow logs: DVC's words, or the stage's."""
    if line.startswith("ERROR: failed to reproduce") or dvc_locks.REFUSAL.match(line):
        return True
    return error_file.is_file() and line in f"{name}: {read_json(error_file)['message']}".splitlines()


def _stage_error(name: str, error_file: Path, lines: list[str], code: int) -> StageError:
    """The stage's own words; where it had none, what DVC said."""
    if error_file.is_file():
        error = read_json(error_file)
        return StageError(f"{name}: {error['message']}", retryable=error["retryable"])
    of_dvc = [line for line in lines if line.startswith("ERROR: ")]
    of_stage = [line for line in lines if line not in of_dvc]
    for line in of_dvc:
        if failures.FULL.search(line):
            return StageError(
                f"{name}: no space is left on the disk where DVC keeps the result ({line.removeprefix('ERROR: ')}); "
                f"free some and run the same again; partial work is kept in {error_file.parent / name}"
            )
        if ended := STAGE_ENDED.search(line):
            if ended["status"] in ("-9", "137"):
                return StageError(f"{name}: its process was killed; if memory ran out, use a smaller batch_size")
            if of_stage and of_stage[-1].startswith((f"{name}: ", f"tasks.{name}: ")):  # it could not write the file
                return StageError(of_stage[-1])
    return StageError("\n".join([f"{name}: DVC ended with status {code}, saying:", *lines[-15:]]))


def _checked_settings(
    root: Path, target: str, variables: Mapping[str, str], changes: Sequence[str] = ()
) -> dict[str, Any]:
    """All settings of the target, checked before any work, and that its sources can be had.

    In a process of its own, which loads the modules of the target's kind.

    Args:
        changes: further words of that process's command line: --set and --as.
    """
    params.read_target(root, target)
    check = [sys.executable, "-m", "tasks.targets", target, "--ready", *changes]
    run = subprocess.run(check, cwd=root, env=environment(variables), capture_output=True, text=True)
    if run.returncode:
        raise T5Error(run.stderr.strip())
    return json.loads(run.stdout)


def show(root: Path, target: str) -> None:
    """Print the report's summary and where everything is."""
    from rich.console import Console
    from rich.markdown import Markdown

    out, console = root / f"data/out/{target}", Console(highlight=False)
    console.print(Markdown((out / "report/summary.md").read_text(encoding="utf-8")))
    pipeline = (out / "fetch" / NOTE).exists()
    for what, where in {
        "report": out.relative_to(root) / "report/report.html",
        "model": out.relative_to(root) / "finetune",
        **({"as a pipeline": f"python -m tasks.studies.export {target} --out {target}-t5"} if pipeline else {}),
        "runs compared": "make ui",
        "for git": "dvc.lock, the record of what was made; commit it to share the results (docs/teams.md)",
    }.items():
        console.print(f"[bold]{what:>14}[/]  {where}", soft_wrap=True)


def main() -> None:
    parser = command_line.parser("flows.t5", str(__doc__))
    command_line.add_target(parser, default="dinov2-fashion")
    parser.add_argument(
        "--on",
        nargs="+",
        metavar="STAGE=POOL",
        default=[],
        help="run a stage on the machine that serves a work pool (default: all run here; docs/teams.md)",
    )
    arguments = params.parse_with_changes(parser)
    if odd := [word for word in arguments.on if not all(word.partition("=")[::2])]:
        parser.error(f"--on {odd[0]}: expected STAGE=POOL, such as finetune=gpu")
    root, target, name = Path.cwd(), arguments.target, arguments.name
    changes = ["--set", *arguments.set, "--as", name] if arguments.set else []

    def flow() -> State:
        if changes:
            params.write_changed(root, target, arguments.set, name)
            print(f"params.yaml: '{name}' is {target} with {' '.join(arguments.set)}", flush=True)
        return t5(name, dict(word.split("=", 1) for word in arguments.on), return_state=True)

    command.run(
        lambda: targets.libraries(params.read_target(root, target)),
        lambda variables: _checked_settings(root, target, variables, changes),
        flow,
    )
    show(root, name)


if __name__ == "__main__":
    main()
