"""The work pool: made once, one run at a time, left as its user set it; what a worker left holds no place."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.settings import PREFECT_API_URL
from prefect.states import Pending, Running

from flows import killed, pool
from t5lib.utils.errors import T5Error
from tasks.runtime import processes

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("prefect"), pytest.mark.usefixtures("prefect")]


@flow
def waiting():
    pass


@pytest.fixture
def client():
    with get_client(sync_client=True) as client:
        yield client
        client.delete_work_pool(pool.NAME)


def test_it_is_made_with_a_limit_and_not_overwritten(client):
    pool.ready(PREFECT_API_URL.value())
    assert client.read_work_pool(pool.NAME).concurrency_limit == 1
    client.update_work_pool(pool.NAME, WorkPoolUpdate(concurrency_limit=3))
    pool.ready(PREFECT_API_URL.value())
    assert client.read_work_pool(pool.NAME).concurrency_limit == 3


def test_one_that_takes_other_work_is_refused(client):
    client.create_work_pool(WorkPoolCreate(name=pool.NAME, type="docker", description="of Ada"))
    with pytest.raises(T5Error, match=r"work pool 'local' of type docker \(of Ada\), which `make up` did not make"):
        pool.ready(PREFECT_API_URL.value())
    assert client.read_work_pool(pool.NAME).description == "of Ada"


def test_runs_that_nobody_works_on_hold_no_place(client):
    pool.ready(PREFECT_API_URL.value())
    made = {
        name: client.create_flow_run(waiting, state=state, tags=tags, work_pool_name=pool.NAME).id
        for name, state, tags in (
            ("taken, not begun", Pending(), []),
            ("begun, not signed", Running(), []),
            ("at work without its worker", Running(), [killed.PROCESS + processes.identity()]),
        )
    }
    pool.ready(PREFECT_API_URL.value())
    after = {name: client.read_flow_run(run).state.type.value for name, run in made.items()}
    for run in made.values():
        client.delete_flow_run(run)
    assert list(after.values()) == ["SCHEDULED", "CRASHED", "RUNNING"]
