"""One stage on several machines: how they find each other, and how to read SLURM's variables."""

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from t5lib.utils.errors import T5Error

if TYPE_CHECKING:
    from torch.distributed import TCPStore

NODE = "NODE_RANK"  # the variable that gives a node its number
RETRY = 1.0  # seconds
SILENCE = timedelta(seconds=60)  # the longest that a node waits for an answer of another
FIRST_PORT, PORTS = 15000, 16000  # a SLURM step takes one of PORTS ports, from FIRST_PORT on


@dataclass(frozen=True)
class Meeting:
    """Where the processes of all nodes meet (`port` of `host`, which is node 0), and the number of this node."""

    host: str
    port: int
    node: int
    nodes: int


def own_number(nodes: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number of this node among `nodes`. Raises T5Error if the environment does not give it."""
    if nodes == 1:
        return 0
    given = environment.get(NODE, "")
    if not given.isdecimal() or int(given) >= nodes:
        raise T5Error(
            f"params.yaml: launch.nodes is {nodes}, and {NODE} is {given or 'not set'}; set it on every node, from 0 "
            f"on the first (the one of launch.address) to {nodes - 1} on the last"
        )
    return int(given)


@contextmanager
def met(node: int, nodes: int, address: str | None, work: str) -> Iterator[Meeting]:
    """Wait for the other nodes at `address`, host:port of the first; within this context, their processes can meet.

    Args:
        work: what this node is about to do, in words, the same on all nodes.

    Raises:
        T5Error: two nodes have the same number; no such host, or a port that is taken; nodes that are about to do
            different work.
    """
    if nodes == 1:
        yield Meeting("127.0.0.1", 0, 0, 1)
        return
    host, _, port = str(address).rpartition(":")
    print(f"node {node} of {nodes}: waiting at {address} until all have started {work}", flush=True)
    store = _store(host, int(port), node)
    try:
        if store.add(f"came {node}", 1) > 1:
            raise T5Error(
                f"two nodes have {NODE} {node}; give each of the {nodes} its own number, from 0 to {nodes - 1}"
            )
        if node == 0:
            store.set("port", str(_free_port()))
        store.set(f"work {node}", work)
        names = [f"work {each}" for each in range(nodes)]
        while not store.check(names):
            time.sleep(RETRY)
        works = [store.get(name).decode() for name in names]
        meeting = Meeting(host, int(store.get("port")), node, nodes)
        store.add("read", 1)
        while node == 0 and store.add("read", 0) < nodes:  # the store ends with the first node
            time.sleep(RETRY)
    except RuntimeError as error:
        raise T5Error(
            f"node {node}: the first node, {address}, has ended; see its own message for the reason"
        ) from error
    for each, its in enumerate(works):
        if its != work:
            raise T5Error(
                f"node {node} was started with {work}, node {each} with {its}; start all with the same command"
            )
    yield meeting


def _store(host: str, port: int, node: int) -> "TCPStore":
    """The store that the first node opens. The others wait until it is there; the wait can be interrupted."""
    from torch.distributed import TCPStore

    try:
        while node > 0:
            try:
                socket.create_connection((host, port), timeout=SILENCE.seconds).close()
                break
            except (ConnectionError, TimeoutError):
                time.sleep(RETRY)
        return TCPStore(host, port, is_master=node == 0, timeout=SILENCE, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        why = "another program uses the port" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise T5Error(
            f"params.yaml: launch.address {host}:{port} cannot be used ({why}); expected a free port of the first "
            "node, by a name that all nodes can resolve"
        ) from None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set, from those of `srun`; none outside a step with several tasks."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    try:
        of_nodes = _numbers(environment["SLURM_STEP_TASKS_PER_NODE"])
        step = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        told = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": tasks,
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(of_nodes[int(environment["SLURM_NODEID"])]),
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(FIRST_PORT + step % PORTS),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise T5Error(
            f"SLURM started {tasks} tasks, but its variables do not say how they are to meet ({error!r}); start them "
            "with `srun`, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        ) from None
    return {name: environment.get(name, value) for name, value in told.items()}


def first_host(hosts: str) -> str:
    """The first host of a list as SLURM writes it: gpu03 of "gpu[03-05,9],cpu1"."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", hosts).split(",")[0]


def _numbers(counts: str) -> list[int]:
    """The counts of all nodes, from SLURM's short form: 4, 4, 2 of "4(x2),2"."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(number) for number, times in runs for _ in range(int(times or 1))]
