"""CUDA graphs: a call is recorded once and then launched as a whole, so that its time is the device's, not Python's."""

from collections.abc import Callable
from typing import Any

import torch

# The first calls compile kernels, choose algorithms and allocate workspaces, none of which a recording may do.
WARM_UP_CALLS = 3


def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """Record what `call` does on the current CUDA device.

    Args:
        call: takes no arguments. Its inputs must stay where they are in memory, because every replay reads them there.

    Returns:
        A function that replays the recording and returns its output, which is the same memory every time.

    Raises:
        RuntimeError: there is no CUDA device, or it refuses to record the call.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph cannot be recorded without a CUDA device")
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay
