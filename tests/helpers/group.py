"""A group of processes that work together, as torchrun starts them: kept warm, for one check after another."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

PRELOAD = ["timm", "diffusers.models.transformers", "t5lib.training.classifier", "t5lib.training.denoiser", "t5lib"]
PATIENCE = 90.0  # seconds for one check


class Group:
    """So many processes of one group (gloo); a context manager."""

    def __init__(self, number: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ends, self.processes = [], []
        for rank in range(number):
            end, its = context.Pipe()
            process = context.Process(target=_serve, args=(its, rank, number, port), daemon=True)
            process.start()
            self.ends.append(end)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function of an importable module returns in each of them; an exception is returned, too."""
        for end in self.ends:
            end.send((function, arguments))
        return [end.recv() if end.poll(PATIENCE) else TimeoutError("no answer") for end in self.ends]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(end: Any, rank: int, number: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = error
        end.send(answer)
