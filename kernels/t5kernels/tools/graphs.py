"""CUDA graphs: a call is recorded once and then launched as a whole, so that its time is the device's, not Python's."""

from collections.abc import Callable
from typing import Any

import torch

# The first calls compile kernels, choose algorithms and allocate workspaces, none of which a recording may do.
WARM_UP_CALLS = 3


def recorded(call: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """Record what `call` does on the current CUDA device.

    Args:
        call: takes no arguments. Its inputs must stay where they are in memory, because every replay reads them there.
        pool: of memory that several recordings share (`torch.cuda.graph_pool_handle()`); None for memory of its own. A
            replay may overwrite what the others gave, and no two may run at once.

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
    # What other threads do meanwhile, such as a loader's that pins memory, is no mistake.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay
