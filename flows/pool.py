"""The work pool that triggered runs wait in: one at a time, since they share this machine and measure its speed.

It is the pool that limits them, not the deployments: Prefect ends a run, hours of training, when the server cannot be
reached at the moment at which the run has to renew its place under a deployment's limit.
"""

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled

from flows import killed
from t5lib.utils.errors import T5Error

NAME, TYPE, AT_ONCE = "local", "process", 1


def ready(url: str, name: str = NAME) -> None:
    """Make the pool of the server at `url` if it has none, and clear up what a worker that is gone left in it.

    A pool that is there stays as it is, also with the limit that its user gave it. No worker may run.

    Raises:
        T5Error: there is a pool of that name that takes other work.
    """
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        try:
            _must_be_ours(client.read_work_pool(name))
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type=TYPE, concurrency_limit=AT_ONCE))
        _clear(client, name)


def _must_be_ours(pool: WorkPool) -> None:
    if pool.type != TYPE:
        raise T5Error(
            f"the server has a work pool '{pool.name}' of type {pool.type} ({pool.description or 'no description'}), "
            "which `make up` did not make and leaves alone. If nobody needs it: "
            f"`.venv/bin/prefect work-pool delete {pool.name}`"
        )


def _clear(client: SyncPrefectClient, name: str) -> None:
    """Runs that nobody works on hold no place: those that had begun have crashed, the others wait again."""
    ours = filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[name]))
    for run in client.read_flow_runs(flow_run_filter=killed.in_state(StateType.PENDING), work_pool_filter=ours):
        client.set_flow_run_state(run.id, Scheduled(), force=True)
    for run in client.read_flow_runs(flow_run_filter=killed.in_state(StateType.RUNNING), work_pool_filter=ours):
        signed = any(tag.startswith(killed.PROCESS) for tag in run.tags)
        if killed.is_gone(run) or not signed:
            killed.crash(client, run)
