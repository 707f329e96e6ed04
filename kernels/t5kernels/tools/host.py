"""Time what a layer costs on the host, apart from what its kernels cost on the card.

    python -m t5kernels.tools.host --out FILE.json

With so few tokens the card always finishes first, so the time until a call returns is the host's. The layer is called
eagerly, and compiled by torch.compile in its default mode; without gradients, with them, and backward. A compiled model
checks its inputs once, however many layers it has, so a figure is what one more layer costs. Every layer has queries,
keys and parameters of its own, as in a model: where layers share them, PyTorch also adds up their gradients.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
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
LAYERS = (1, 5)
VALUES = ("v", "text_v")  # names of leaves
CALLS, ROUNDS = 20, 25  # a round is short enough for the card's queue of launches


def host_us(call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    """Microseconds until a call returns, the median of rounds.

    `prepare` runs before each round, once for every call, and makes what the calls use up: `call` gets no arguments,
    but may take from a list that `prepare` fills.
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


def chained(inputs: Inputs, leaves: Sequence[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """The outputs of layers with these leaves; each but the first takes the outputs of the one before as its values."""
    outs = inputs.layer("triton", **leaves[0])
    for own in leaves[1:]:
        outs = inputs.layer("triton", **own | dict(zip(VALUES, outs, strict=False)))
    return outs


def call_us(inputs: Sequence[Inputs], compiled: bool) -> dict[str, float]:
    """Microseconds of host time for a layer on each of the inputs, by kind of call."""
    every = [dict(each.leaves) for each in inputs]
    for own in every[1:]:
        for name in VALUES:
            own.pop(name, None)
    leaves = [t for own in every for t in own.values()]
    detached = [{name: t.detach() for name, t in own.items()} for own in every]
    model: Callable[..., tuple[torch.Tensor, ...]] = partial(chained, inputs[0])
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model)
    forward, outputs = partial(model, every), list[tuple[torch.Tensor, ...]]()

    def differentiate() -> None:
        torch.autograd.grad(outputs.pop(), leaves, inputs[0].d_outs)

    def keep() -> None:
        outputs.append(forward())

    with torch.inference_mode():
        us = {"inference_us": host_us(partial(model, detached))}
    return us | {"forward_us": host_us(forward), "backward_us": host_us(differentiate, keep)}


def measure(case: Case) -> dict[str, Any]:
    """Microseconds of host time that one more layer costs, by kind of call."""
    inputs = [Inputs.draw(case) for _ in range(max(LAYERS))]
    row: dict[str, Any] = {"case": case.name, "shape": str(case)}
    for way, compiled in (("eager", False), ("compiled", True)):
        few, many = (call_us(inputs[:layers], compiled) for layers in LAYERS)
        row |= {f"{way}_{kind}": (many[kind] - few[kind]) / (LAYERS[1] - LAYERS[0]) for kind in few}
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, after every case")
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
