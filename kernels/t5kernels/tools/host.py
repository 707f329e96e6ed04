"""Time what a call of the layer costs Python, beside what its kernels cost the card.

    python -m t5kernels.tools.host --out FILE.json

On so few tokens the card is always done first, so the time until a call returns is the host's. The layer is called as
people call it: eager, and compiled by torch.compile in its default mode; without gradients, with them, and backward.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from t5kernels.tools.bench import write
from t5kernels.tools.cases import Case, Inputs

CASES = (
    Case(name="image", images=2, rows=8, columns=8, heads=24, width=64),
    Case(name="image and text", images=2, rows=8, columns=8, heads=24, width=64, text=16),
)
CALLS, ROUNDS = 20, 25  # a round is short enough for the card's queue of launches


def host_us(call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    """Microseconds until a call returns, the median of rounds. `prepare` comes before each round, once for every call.

    It makes what the calls use up: `call` is given no arguments and may take from a list that `prepare` fills.
    """
    times = []
    for _ in range(ROUNDS):
        for _ in range(CALLS):
            prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def measure(case: Case) -> dict[str, Any]:
    """Microseconds of host time of one case, by way of calling."""
    inputs = Inputs.draw(case)
    leaves, detached = list(inputs.leaves.values()), {name: t.detach() for name, t in inputs.leaves.items()}
    row: dict[str, Any] = {"case": case.name, "shape": str(case)}
    for way, layer in (("eager", inputs.layer), ("compiled", torch.compile(inputs.layer))):
        forward, outputs = partial(layer, "triton"), list[tuple[torch.Tensor, ...]]()

        def differentiate(outputs: list = outputs) -> None:
            torch.autograd.grad(outputs.pop(), leaves, inputs.d_outs)

        def keep(outputs: list = outputs, forward: Callable = forward) -> None:
            outputs.append(forward())

        with torch.inference_mode():
            row[f"{way}_inference_us"] = host_us(partial(forward, **detached))
        row[f"{way}_forward_us"] = host_us(forward)
        row[f"{way}_backward_us"] = host_us(differentiate, keep)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the figures as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; this measures how long Python takes to start kernels on one")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rows.append(measure(case))
        write(options.out, {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows})
        print(json.dumps(rows[-1], indent=1), flush=True)


if __name__ == "__main__":
    main()
