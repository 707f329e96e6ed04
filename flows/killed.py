"""Flow runs whose process is gone are marked as crashed: they would seem to run forever and keep others waiting."""

import logging

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Crashed

from tasks.runtime import processes

PROCESS = "process "  # begins the tag that says whose a flow run is


def sign_and_sweep(log: logging.Logger | logging.LoggerAdapter) -> None:
    """In a flow: note on its run which process it is, and mark as crashed the runs whose process is gone."""
    try:
        with get_client(sync_client=True) as client:
            tags = [*runtime.flow_run.tags, PROCESS + processes.identity()]
            client.update_flow_run(runtime.flow_run.id, tags=tags)
            for run in client.read_flow_runs(flow_run_filter=in_state(StateType.RUNNING)):
                if is_gone(run):
                    crash(client, run)
    except Exception as error:  # the record must not stop the work
        log.warning("Prefect's record of earlier runs could not be cleaned up: %s: %s", type(error).__name__, error)


def in_state(state: StateType) -> filters.FlowRunFilter:
    return filters.FlowRunFilter(state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[state])))


def is_gone(run: FlowRun) -> bool:
    """Whether its process has ended; False where the run does not say which that is."""
    return any(processes.is_gone(tag.removeprefix(PROCESS)) for tag in run.tags if tag.startswith(PROCESS))


def crash(client: SyncPrefectClient, run: FlowRun) -> None:
    state: State = Crashed(message="its process was killed; run it again to go on from its last checkpoint")
    its_tasks = client.read_task_runs(flow_run_filter=filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[run.id])))
    for task in its_tasks:
        if task.state is not None and not task.state.is_final():
            client.set_task_run_state(task.id, state, force=True)
    client.set_flow_run_state(run.id, state, force=True)
