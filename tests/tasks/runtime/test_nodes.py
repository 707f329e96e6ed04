"""Nodes that cannot work together say why; SLURM's variables say where its tasks meet."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from t5lib.utils.errors import T5Error
from tasks.runtime import nodes

STEP = {
    "SLURM_JOB_ID": "770", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "10", "SLURM_PROCID": "9", "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_STEP_NODELIST": "gpu[03-05,9],cpu1",
}  # fmt: skip


def test_a_task_of_slurm_knows_its_place():
    told = {"RANK": "9", "WORLD_SIZE": "10", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert nodes.of_slurm(STEP) == told | {"MASTER_ADDR": "gpu03", "MASTER_PORT": "15772"}
    assert nodes.of_slurm(STEP | {"MASTER_ADDR": "10.0.0.3"})["MASTER_ADDR"] == "10.0.0.3"


def test_outside_of_a_step_of_several_tasks_slurm_decides_nothing():
    batch = {"SLURM_JOB_ID": "770", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # the script that calls srun
    for environment in (batch, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"RANK": "0"}):
        assert nodes.of_slurm(environment) == {}
    with pytest.raises(T5Error, match=r"SLURM started 10 tasks, but .*SLURM_NODEID.*set RANK"):
        nodes.of_slurm({name: value for name, value in STEP.items() if name != "SLURM_NODEID"})


@pytest.mark.parametrize(
    ("hosts", "first"), [("gpu7", "gpu7"), ("gpu7,gpu8", "gpu7"), ("r[2,4]n[08-11].lan,x[1]", "r2n08.lan")]
)
def test_the_first_of_slurms_hosts(hosts, first):
    assert nodes.first_host(hosts) == first


@pytest.mark.parametrize("given", [{}, {"NODE_RANK": "2"}, {"NODE_RANK": "first"}])
def test_a_node_needs_a_number(given):
    with pytest.raises(T5Error, match=r"launch.nodes is 2, and NODE_RANK is .* from 0 on the first"):
        nodes.own_number(2, given)


@pytest.mark.parametrize(
    ("works", "messages"),
    [
        (("align of a", "align of a"), ("0 of 2 at 127.0.0.1", "1 of 2 at 127.0.0.1")),
        (("align of a", "align of b"), ("node 1 with align of b; start all", "node 0 with align of a; start all")),
    ],
)
def test_nodes_meet_for_the_same_work_alone(works, messages, monkeypatch):
    monkeypatch.setattr(nodes, "RETRY", 0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def one(number: int, work: str) -> str:
        try:
            with nodes.met(number, 2, address, work) as meeting:
                return f"{meeting.node} of {meeting.nodes} at {meeting.host}"
        except T5Error as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(one, (0, 1), works))
    assert all(message in end for message, end in zip(messages, ends, strict=True)), ends


def test_a_taken_port_and_an_unknown_host_are_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(T5Error, match=r"launch.address 127.0.0.1:\d+ cannot be used \(another program uses"):
            with nodes.met(0, 2, f"127.0.0.1:{taken.getsockname()[1]}", "align"):
                pass
    with pytest.raises(T5Error, match=r"launch.address no-such-host.invalid:29400 cannot be used"):
        with nodes.met(1, 2, "no-such-host.invalid:29400", "align"):
            pass
