"""What flows ask of Prefect's server: that a temporary one ends with its flow, and that no killed run seems to run."""

import logging

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import get_current_settings
from prefect.states import Crashed

from flows.process import end_with_us
from tasks.runtime import processes

PROCESS = "process "  # begins the tag that says whose a flow run is


def end_temporary_server_with_us() -> None:
    """Prefect stops the server that it starts for a flow only where the flow can still ask for it."""
    from prefect.server.api.server import SubprocessASGIServer  # seconds, which a flow with a server need not spend

    start = SubprocessASGIServer._run_uvicorn_command

    def watched(server):
        process = start(server)
        end_with_us(process.pid)
        return process

    SubprocessASGIServer._run_uvicorn_command = watched


def sign_and_sweep(log: logging.Logger | logging.LoggerAdapter) -> None:
    """In a flow: note on its run which process it is, and mark as crashed the runs whose process is gone."""
    try:
        with get_client(sync_client=True) as client:
            tags = [*runtime.flow_run.tags, PROCESS + processes.identity()]
            client.update_flow_run(runtime.flow_run.id, tags=tags)
            for run in client.read_flow_runs(flow_run_filter=_RUNNING):
                if any(processes.is_gone(tag.removeprefix(PROCESS)) for tag in run.tags if tag.startswith(PROCESS)):
                    _crash(client, run)
    except Exception as error:  # the record must not stop the work
        log.warning("Prefect's record of earlier runs was not cleared up: %s: %s", type(error).__name__, error)


_RUNNING = filters.FlowRunFilter(
    state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[StateType.RUNNING]))
)


def _crash(client: SyncPrefectClient, run: FlowRun) -> None:
    state: State = Crashed(message="its process was killed; run it again to go on from its last checkpoint")
    its_tasks = client.read_task_runs(flow_run_filter=filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[run.id])))
    for task in its_tasks:
        if task.state is not None and not task.state.is_final():
            client.set_task_run_state(task.id, state, force=True)
    client.set_flow_run_state(run.id, state, force=True)


if get_current_settings().api.url is None:
    end_temporary_server_with_us()
