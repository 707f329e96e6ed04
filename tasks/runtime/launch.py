"""Start as many processes for a stage as params.yaml says, with Accelerate's launcher, or join those that torchrun,
SLURM or `accelerate launch` started already.

The section `launch` applies to all targets. No result depends on it, so no stage runs again when it changes.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from t5lib.utils.config import AtLeastOne, from_dict, settings
from t5lib.utils.errors import T5Error
from tasks.runtime import params, warm
from tasks.runtime.nodes import Meeting

OUTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # what a launcher tells the processes that it starts
INTERRUPTED = 130


@settings
class LaunchConfig:
    """How many processes share the work of a stage.

    Attributes:
        processes: on this machine. null means one on each accelerator that torch sees, or fewer if not all of them can
            share the stage's batches; without an accelerator, one.
        strategy: with "ddp", every process holds all weights. With "fsdp2", it holds a shard of weights, gradients and
            optimizer state, for a training that is too large for one card.
        nodes: machines that share the stage. All see the repository's folder, and run the same command.
        address: "host:port" of the first node, by a name that the others can reach.
    """

    processes: AtLeastOne | None = None
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    nodes: AtLeastOne = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.nodes > 1 and not re.fullmatch(r".+:[0-9]{1,5}", self.address or ""):
            raise T5Error(
                f"nodes is {self.nodes} and address {self.address}; expected address host:port, a free port of the "
                "first node by a name that the others can reach, such as gpu-a:29400"
            )


def config(root: Path) -> LaunchConfig:
    """The section `launch` of params.yaml. Raises T5Error for unknown or invalid settings."""
    return from_dict(LaunchConfig, params.read(root).get("launch") or {}, "params.yaml: launch")


def number(config: LaunchConfig, sections: Mapping[str, Any]) -> int:
    """How many processes to start on this node for a stage that reads these sections.

    Raises:
        T5Error: the processes cannot share the stage's batches.
    """
    wanted = _wanted(config)
    most = next((fewer for fewer in range(wanted, 0, -1) if not _uneven(sections, fewer * config.nodes)), 0)
    if most < wanted:
        on_nodes = f" on {config.nodes} nodes" if config.nodes > 1 else ""
        reason = f"{wanted * config.nodes} processes{on_nodes} cannot share {_uneven(sections, wanted * config.nodes)}"
        if config.processes or not most:
            advice = f"set it to {most}, for example, or change the batch sizes" if most else "change the batch sizes"
            raise T5Error(f"params.yaml: launch.processes: {reason}; {advice}")
        print(f"using {most} of {wanted} accelerators: {reason}", flush=True)
    return most


def pieces(config: LaunchConfig) -> int:
    """How many processes FSDP2 spreads a training over; 1 without FSDP2."""
    return _wanted(config) * config.nodes if config.strategy == "fsdp2" else 1


def _wanted(config: LaunchConfig) -> int:
    """Processes on each node, if the batches of a stage allow as many."""
    if config.processes is not None:
        return config.processes
    import torch

    return max(1, torch.accelerator.device_count())


def _uneven(settings: Mapping[str, Any], processes: int) -> str:
    """The first batches in `settings` that `processes` cannot share (t5lib.training.trainer.part_of), in words; "" if
    they can share all."""
    for name, section in settings.items():
        if not isinstance(section, Mapping) or section.get("steps") == 0:
            continue
        if inner := _uneven(section, processes):
            return f"{name}.{inner}"
        size, turns = section.get("batch_size", 0), section.get("accumulate", 1)
        pairs = 2 if section.get("mixup") or section.get("cutmix") else 1
        if "lr" in section and turns % processes and size % (processes * pairs):
            return f"{name}.batch_size {size} with accumulate {turns}{', in pairs' if pairs == 2 else ''}"
    return ""


def joined() -> bool:
    """Whether a launcher has started this process, with others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def leave() -> None:
    """This process works alone, although a launcher started others."""
    for name in OUTER:
        os.environ.pop(name, None)


def start(module: str, arguments: Sequence[str], processes: int, meeting: Meeting) -> None:
    """Run `python -m module arguments` in `processes` processes of one group, until all have ended.

    An error in one of them ends them all. They write to our stdout and stderr.

    Args:
        processes: on this node.
        meeting: of the nodes (tasks.runtime.nodes.met).

    Raises:
        T5Error: one was killed.
        SystemExit: one failed, and has said why; 130 after an interrupt, once all have saved their work.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it would repeat their messages at length
    os.environ |= _environment(os.environ, processes)
    everywhere = processes * meeting.nodes
    options = ["--multi_gpu", "--num_processes", str(everywhere), "--num_machines", str(meeting.nodes)]
    options += ["--machine_rank", str(meeting.node), "--same_network"]
    options += ["--main_process_ip", meeting.host, "--main_process_port", str(meeting.port)]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module", module, *arguments]
    try:
        launch_command(launch_command_parser().parse_args(options))
    except SignalException:
        sys.exit(INTERRUPTED)
    except ChildFailedError as error:
        ends = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, status in ends.items():
            if status == -signal.SIGKILL:
                raise T5Error(
                    f"process {rank} of {everywhere} was killed, and the others were stopped; if memory ran out, use "
                    "a smaller batch_size"
                ) from None
        sys.exit(INTERRUPTED if INTERRUPTED in ends.values() else 1)


def _environment(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """What the processes get beside our own: their share of the cores, and the way to start at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    extra = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    extra["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # or DDP would warn that it looks for unused weights, and why not to
    extra = {name: environment.get(name, value) for name, value in extra.items()}
    return extra | ({warm.ADDRESS: environment[warm.KEPT]} if warm.KEPT in environment else {})
