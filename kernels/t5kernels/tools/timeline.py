"""Show where a layer's time goes: what each kernel adds to it, in a CUDA graph of a forward or of both passes.

    python -m t5kernels.tools.timeline --out FILE.json [--case NAME ...]

Launches overlap, so a kernel's own duration also counts its wait for the one before. Here a kernel is given the time
from the end of all before it to its own end; these times add up to the whole.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from t5kernels.tools.bench import surroundings, write
from t5kernels.tools.cases import CASES, Case, Inputs
from t5kernels.tools.graphs import recorded

REPLAYS = 20
EMPTIED = 64 * 2**20  # float32 numbers that are written before every replay, more than the L2 cache holds


class Kernel(NamedTuple):
    """One launch: its kernel, numbers of programs, registers a thread, and the microseconds that it adds."""

    name: str
    programs: tuple[int, ...]
    registers: int
    us: float


def passes(case: Case) -> dict[str, Callable[[], Any]]:
    """By name, the forward without gradients, and forward with backward."""
    inputs = Inputs.draw(case)
    leaves, detached = list(inputs.leaves.values()), {name: t.detach() for name, t in inputs.leaves.items()}

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return inputs.layer("triton", **detached)

    return {"forward": forward, "both": lambda: torch.autograd.grad(inputs.layer("triton"), leaves, inputs.d_outs)}


def timeline(call: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a call in their order, medians over replays of its graph."""
    replay, emptied = recorded(call), torch.empty(EMPTIED, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            emptied.zero_()
            replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    runs = list(_replays([event for event in events if event.get("cat") == "kernel"]))
    assert len({len(run) for run in runs}) == 1, "replays of a graph differ"
    return [
        Kernel(*(kernel[:3]), us=round(statistics.median(run[place].us for run in runs), 2))
        for place, kernel in enumerate(runs[0])
    ]


def _replays(events: list[dict[str, Any]]) -> Iterator[list[Kernel]]:
    """The kernels of each replay; what empties the cache comes before each."""
    run: list[Kernel] = []
    for event in sorted(events, key=lambda each: each["ts"]):
        end = event["ts"] + event["dur"]
        if "fill" in event["name"].lower():
            if run:
                yield run
            run, last = [], end
            continue
        arguments = event["args"]
        run.append(
            Kernel(event["name"], tuple(arguments["grid"]), arguments["registers per thread"], max(0.0, end - last))
        )
        last = max(last, end)
    yield run


def table(kernels: list[Kernel]) -> str:
    rows = [f"{each.us:8.1f} us  {each.name:<34} {each.programs}  registers {each.registers}" for each in kernels]
    return "\n".join([*rows, f"{sum(each.us for each in kernels):8.1f} us in all"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, after every case")
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES], help="these only (default: all)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; this reads the times of kernels on one")
    rows = []
    for case in CASES:
        if case.name in (options.case or [case.name]):
            found = {name: timeline(call) for name, call in passes(case).items()}
            rows.append({"case": asdict(case)} | {name: [k._asdict() for k in each] for name, each in found.items()})
            write(options.out, {**surroundings(), "cases": rows})
            for name, kernels in found.items():
                print(f"{case}, {name}\n{table(kernels)}\n", flush=True)


if __name__ == "__main__":
    main()
