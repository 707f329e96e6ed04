"""A stage of a flow on another machine: a Prefect worker there runs it, a DVC remote carries what it reads and makes.

The target's entries of dvc.lock go there with the order to run (flows/stage.py), and the stage's new entry comes back.
So DVC decides there, as it would here, whether there is anything to do, and accepts the result here as its own.
"""

import hashlib
import json
import time
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from httpx import HTTPError
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Completed, Failed, State

from flows import killed
from flows.outcome import StageError
from flows.process import environment, stream
from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256, write_text
from tasks.runtime import params

FLOW = "stage"  # its deployment for a work pool has the pool's name
POLL = 3.0  # seconds
LOST = 120.0  # seconds without a worker, beyond those after which Prefect calls one offline
SHOWN = 8  # last lines of DVC's output that a message shows


def check(names: list[str], pools: dict[str, str]) -> None:
    """Raises T5Error for stages that are not among `names`, and for work pools that no machine has ever served."""
    if unknown := [name for name in pools if name not in names]:
        raise T5Error(f"there is no stage '{unknown[0]}' to run elsewhere; the stages are {', '.join(names)}")
    if not pools:
        return
    with get_client(sync_client=True) as client:
        for pool in dict.fromkeys(pools.values()):
            try:
                client.read_deployment_by_name(f"{FLOW}/{pool}")
            except ObjectNotFound:
                raise T5Error(
                    f"no machine serves the work pool '{pool}'; run `python -m flows.services work --pool {pool}` on "
                    "one, with this Prefect server's address in PREFECT_API_URL"
                ) from None


def run_stage(root: str, name: str, target: str, pool: str, parent: str) -> State:
    """Bring one stage up to date on the machine that serves `pool`. `parent`: the flow's run in MLflow."""
    log, place = get_run_logger(), Path(root)
    if not _changed(place, name, target):
        return Completed(message="nothing changed", data=None)
    try:
        if inputs := inputs_of(place, name, target):
            dvc(place, log, "push", *inputs)
        order = {"name": name, "target": target, "lock": locked(place, f"@{target}"), "parent": parent}
        order["made_of"] = made_of(place, name, target)
        run = run_deployment(f"{FLOW}/{pool}", parameters=order, timeout=0)
        log.info("%s runs on a machine of the work pool '%s': flow run '%s'", name, pool, run.name)
        state = _end_of(run.id, pool, log)
        if not state.is_completed():
            return _failed(f"{name}: on a machine of the work pool '{pool}': {state.message}")
        write_locked(place, _made(run.id))
        dvc(place, log, "pull", f"{name}@{target}")
    except T5Error as error:
        return _failed(f"{name}: {error}")
    if _changed(place, name, target):
        return _failed(
            f"{name}: DVC does not accept here what came back; the two folders differ in what the stage depends on"
        )
    return Completed(message="done", data=None)


def _failed(message: str) -> State:
    error = StageError(message)
    return Failed(message=message, data=error)


def inputs_of(root: Path, name: str, target: str) -> list[str]:
    """The outputs of other stages that the stage reads."""
    return [dep for dep in _deps(root, name, target) if dep.startswith("data/out/")]


def made_of(root: Path, name: str, target: str) -> str:
    """A checksum of all that the stage depends on, settings and code, except the outputs of other stages."""
    seen = hashlib.sha256(json.dumps(params.read_target(root, target), sort_keys=True).encode())
    for dep in _deps(root, name, target):
        if not dep.startswith("data/out/"):
            place = root / dep
            files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
            for file in files:
                if "__pycache__" not in file.parts:
                    seen.update(f"{file.relative_to(root)} {sha256(file)}\n".encode())
    return seen.hexdigest()


def _deps(root: Path, name: str, target: str) -> list[str]:
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return [dep.replace("${item}", target) for dep in stages[name]["do"]["deps"]]


def locked(root: Path, ending: str) -> dict[str, Any]:
    """The entries in dvc.lock of the stages whose names end with `ending`."""
    file = root / "dvc.lock"
    stages = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"] if file.is_file() else {}
    return {name: entry for name, entry in stages.items() if name.endswith(ending)}


def write_locked(root: Path, entries: dict[str, Any]) -> None:
    """Replace the entries of these stages in dvc.lock."""
    file = root / "dvc.lock"
    whole = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {"schema": "2.0", "stages": {}}
    whole["stages"] |= entries
    write_text(file, yaml.safe_dump(whole, sort_keys=False))


def dvc(root: Path, log: Logger | LoggerAdapter, *words: str) -> None:
    """Run `dvc WORDS`. Raises T5Error with its last lines if it fails."""
    lines: list[str] = []
    if stream(["dvc", "--wait-for-lock", *words], lines.append, cwd=root, env=environment({})):
        remedy = "; name a place that all machines reach with `dvc remote add --default` (docs/teams.md)"
        needs = remedy if any("no remote" in line for line in lines) else ""
        raise T5Error("\n".join([f"`dvc {' '.join(words)}` failed{needs}:", *lines[-SHOWN:]]))
    log.info("dvc %s: %s", " ".join(words), lines[-1] if lines else "done")


def _changed(root: Path, name: str, target: str) -> bool:
    """Whether DVC would run the stage, or fetch what it made."""
    lines: list[str] = []
    command = ["dvc", "--wait-for-lock", "status", "--json", f"{name}@{target}"]
    if stream(command, lines.append, cwd=root, env=environment({})):
        raise T5Error("\n".join(["`dvc status` failed:", *lines[-SHOWN:]]))
    return lines[-1:] != ["{}"]


def _end_of(run: UUID, pool: str, log: Logger | LoggerAdapter) -> State:
    """The state in which the run ends; if this flow is stopped, the run is cancelled, too.

    Raises:
        T5Error: the machine of the run is lost.
    """
    heard, told = time.monotonic(), False
    with get_client(sync_client=True) as client:
        try:
            while True:
                try:
                    now = client.read_flow_run(run)
                    if now.state and now.state.is_final():
                        return now.state
                    if _served(client, pool):
                        heard = time.monotonic()
                    elif not told:
                        log.warning("no worker of the work pool '%s' is running; waiting for one", pool)
                        told = True
                    if now.state and now.state.is_running() and time.monotonic() - heard > LOST:
                        killed.crash(client, now)
                        raise T5Error(
                            f"the worker of the pool '{pool}' is lost. Start it again on its machine and repeat your "
                            "command: the stage resumes from its last checkpoint, which is on that machine"
                        )
                except HTTPError as error:  # a server that is away for a while costs nothing
                    log.debug("the Prefect server does not answer: %s", error)
                    heard = time.monotonic()
                time.sleep(POLL)
        except BaseException as error:
            if not isinstance(error, T5Error):
                client.set_flow_run_state(run, Cancelling(), force=True)
            raise


def _served(client: SyncPrefectClient, pool: str) -> bool:
    workers = client.read_workers_for_work_pool(pool)
    return any(worker.status == "ONLINE" for worker in workers)


def _made(run: UUID) -> dict[str, Any]:
    """The stage's entry in dvc.lock where it ran, from the artifact of its flow run."""
    of_run = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[run]))
    with get_client(sync_client=True) as client:
        [artifact] = client.read_artifacts(flow_run_filter=of_run)
    return yaml.safe_load(str(artifact.data).removeprefix("```yaml\n").removesuffix("\n```"))
