"""Runs whose process was killed do not seem to run for ever."""

import pytest
from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.states import Running

from flows import killed
from tasks.runtime import processes

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("prefect"), pytest.mark.usefixtures("prefect")]


@flow
def sweeping():
    killed.sign_and_sweep(get_run_logger())


def test_runs_of_processes_that_are_gone_are_marked_and_others_left_alone():
    host, pid, _ = processes.identity().split()
    tags = {"killed": f"process {host} {pid} 1", "elsewhere": "process another 1 1", "unsigned": "mine"}
    with get_client(sync_client=True) as client:
        runs = {name: client.create_flow_run(sweeping, tags=[tag], state=Running()).id for name, tag in tags.items()}
        state = sweeping(return_state=True)
        after = {name: client.read_flow_run(run).state.type.value for name, run in runs.items()}
        signed = client.read_flow_run(state.state_details.flow_run_id).tags
        for run in runs.values():
            client.delete_flow_run(run)
    assert after == {"killed": "CRASHED", "elsewhere": "RUNNING", "unsigned": "RUNNING"}
    assert signed == [f"process {processes.identity()}"]
