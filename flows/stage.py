"""The flow `stage` runs one stage of a target here, for a flow on another machine (flows/elsewhere.py starts it)."""

from pathlib import Path
from typing import Any

import yaml
from prefect import flow, get_run_logger
from prefect.states import State

from flows import command, elsewhere, killed, outcome
from flows.t5 import KEPT, run_stage
from t5lib.utils.errors import T5Error
from t5lib.utils.locks import exclusive
from tasks import targets
from tasks.runtime import failures, params, tracking


@flow(name=elsewhere.FLOW, flow_run_name="{name} of {target}", persist_result=False)
def stage(name: str, target: str, lock: dict[str, Any], made_of: str, parent: str = "") -> State | None:
    """Run a stage here: its inputs are pulled, its outputs pushed, and its part of dvc.lock becomes an artifact.

    Args:
        name: of the stage, such as finetune.
        target: a section of `targets` in params.yaml.
        lock: the entries of the target's stages in the other machine's dvc.lock.
        made_of: the checksum of the stage's code and settings on the other machine.
        parent: that flow's run in MLflow.

    Raises:
        T5Error: this folder has other code or settings, or DVC's remote cannot be reached.
        StageError: the stage failed; the error has its message.
    """
    root = Path.cwd()
    try:
        with failures.in_words(root, lambda: KEPT):
            _run(root, name, target, lock, made_of, parent)
    except T5Error as error:
        return outcome.failed(error, f"{name} of {target}", KEPT)
    return None


def _run(root: Path, name: str, target: str, lock: dict[str, Any], made_of: str, parent: str) -> None:
    log = get_run_logger()
    libraries = targets.libraries(params.read_target(root, target))
    if elsewhere.made_of(root, name, target) != made_of:
        raise T5Error(
            f"{root} has other code or settings than the folder of the flow, so its results would differ; bring both "
            "to the same commit (git pull), or copy your changes here"
        )
    killed.sign_and_sweep(log)
    with exclusive(root / f"data/scratch/{target}/flow.lock", f"target {target}", log.info):
        with command.warmed(libraries) as variables:
            params.enable(root, target)
            elsewhere.write_locked(root, lock)
            if inputs := elsewhere.inputs_of(root, name, target):
                elsewhere.dvc(root, log, "pull", *inputs)
            state = run_stage(str(root), name, target, variables | {tracking.PARENT_VARIABLE: parent})
            if state.is_failed():
                raise state.data  # the stage's own words
            elsewhere.dvc(root, log, "push", f"{name}@{target}")
    said = yaml.safe_dump(elsewhere.locked(root, f"{name}@{target}"), sort_keys=False)
    outcome.publish(f"{target}-{name}", f"```yaml\n{said}\n```", f"The entry of {name}@{target} in dvc.lock.")
