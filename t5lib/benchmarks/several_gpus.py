"""Time a denoiser's pass that several cards share, beside the whole pass on one card; with random weights.

    torchrun --nproc_per_node 4 -m t5lib.benchmarks.several_gpus --out data/out/several-gpus.json

One run compares the whole pass on one card; its rows shared by two, four … cards (t5lib.parallelize); one card for each
of two latents, with and without the prompt; and both together. All cards work all the time: where two share a pass,
other pairs do the same. Every way is compiled block by block, in bf16, and its output is checked against the same
weights in higher precision before it is timed.

A pass takes as long as the slowest card. PyTorch's profiler gives the number of collective operations in a pass and the
time that the first card spends in them, including the wait for others. Without CUDA only --small runs, to see that
everything works. The file is written after every resolution, and resolutions that are in it are not run again.
"""

import copy
import functools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile

from t5lib.benchmarks.shapes import SHAPES, Shape
from t5lib.benchmarks.timing import (
    Rules,
    TimingConfig,
    attention_choice,
    cast_to,
    check_output,
    compile_model,
    describe_device,
    every_model_compiled,
    peak_mib,
    time_interleaved,
)
from t5lib.benchmarks.training_step import SMALL
from t5lib.conversion import convert
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize, Inputs, placed
from t5lib.layers.config import TTTConfig
from t5lib.parallelism import BATCH, ROWS, parallelize
from t5lib.utils import command_line, processes
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from t5lib.utils.markdown import table

ONE = "one card"
COLLECTIVES = {"cuda": ("ncclDevKernel", "ncclKernel"), "cpu": ("gloo:",)}  # what the names of events begin with
Way = dict[str, int]  # how many cards share along each dimension of a mesh


def ways(cards: int, batch: int) -> dict[str, Way]:
    """The ways in which `cards` can share passes of `batch` latents, by name."""
    every: dict[str, Way] = {ONE: {}}
    counts = [count for count in range(2, cards + 1) if cards % count == 0]
    every |= {f"rows on {count}": {ROWS: count} for count in counts}
    if batch == 2:
        even = [count for count in counts if count % 2 == 0]
        every |= {
            f"guidance on {count}" if count == 2 else f"guidance and rows on {count}": {BATCH: 2, ROWS: count // 2}
            for count in even
        }
    return every


def mesh_of(way: Way, cards: int, device: torch.device) -> DeviceMesh:
    """The mesh of this process; others like it work at the same time."""
    shared = {name: count for name, count in way.items() if count > 1}
    apart = cards // math.prod(shared.values())
    mesh = init_device_mesh(device.type, (apart, *shared.values()), mesh_dim_names=("apart", *shared))
    return mesh[tuple(shared)]


def measure(
    model: nn.Module, inputs: Inputs, config: TimingConfig, rules: Rules, where: str
) -> dict[str, dict[str, Any]]:
    """The figures of every way, by name, the same in all processes.

    Raises:
        T5Error: an output is wrong; no speed is reported then.
    """
    cards = processes.state().num_processes
    calls: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    inputs = placed(inputs, rules.device, rules.dtype)
    with torch.inference_mode(), attention_choice(rules.device), every_model_compiled(rules):
        for name, way in ways(cards, config.batch).items():
            own = cast_to(copy.deepcopy(model), rules.dtype)
            if way:
                parallelize(own, mesh_of(way, cards, rules.device))
            if rules.compiled:
                compile_model(own, inputs)
            calls[name] = functools.partial(family_of(own).call, own, inputs)
            error = check_output(calls[name](), model, inputs, f"{name} {where}")
            found[name] = {"cards": math.prod(way.values()), "relative_error": error}
            found[name] |= communication(calls[name], rules.device)
            found[name]["peak_mib"] = peak_mib(calls[name], own, rules.device)
        times = slowest(calls, config, rules.device)
    for name, ms in times.items():
        found[name] |= {"ms": statistics.median(ms), "ms_runs": ms}
        found[name]["speedup"] = statistics.median(times[ONE]) / statistics.median(ms)
    return found


def slowest(
    calls: dict[str, Callable[[], Tensor]], config: TimingConfig, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of every timed pass on the slowest card, by name; all cards start a pass together."""
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(config.warmup + config.repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            processes.wait()
            [ms] = time_interleaved({name: calls[name]}, warmup=0, repeats=1, device=device)[name]
            runs[name].append(ms)
    every = processes.gathered({name: ms[config.warmup :] for name, ms in runs.items()})
    return {name: [max(ms) for ms in zip(*(each[name] for each in every), strict=True)] for name in calls}


def communication(call: Callable[[], Tensor], device: torch.device) -> dict[str, Any]:
    """Milliseconds that this card spends in collective operations in one pass, and their number."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    processes.wait()
    with profile(activities=kinds) as profiled:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = [event for event in profiled.events() if event.name.startswith(COLLECTIVES[device.type])]
    spent = sum(event.time_range.elapsed_us() for event in events) / 1e3
    return {"communication_ms": spent, "collectives": len(events)}


def run(out: Path, resolutions: list[int], *, shape: Shape, layers: str, config: TimingConfig) -> dict[str, Any]:
    """Measure what is not in `out` yet; the first process writes. Returns everything.

    Raises:
        T5Error: there is only one process.
    """
    if processes.alone():
        raise T5Error("there is only one process; start several with torchrun --nproc_per_node 4")
    state = processes.state()
    rules = Rules.of(config, state.device)
    about = {"device": describe_device(state.device), "cards": state.num_processes, "torch": torch.__version__}
    about |= {"batch": config.batch, "compile": rules.compiled, "dtype": str(rules.dtype).removeprefix("torch.")}
    about |= {"denoiser": shape.family.name, "layers": layers}
    about |= {"shape": {name: list(v) if isinstance(v, tuple) else v for name, v in shape.arguments.items()}}
    before = processes.by_first(lambda: read_json(out) if out.exists() else {})
    rows = before.get("rows", []) if about.items() <= before.items() else []
    model = convert(shape.make(state.device, rules.dtype), TTTConfig(layers=layers), inplace=True).eval()
    for resolution in resolutions:
        if resolution in {row["resolution"] for row in rows}:
            continue
        size = ExampleSize(resolution, config.batch, text_tokens=shape.text_tokens)
        inputs = shape.family.example_inputs(model, size)
        common = {"resolution": resolution, "tokens": shape.family.num_tokens(model, inputs)}
        found = measure(model, inputs, config, rules, f"at {resolution} px")
        rows = rows + [common | {"way": name} | figures for name, figures in found.items()]
        if processes.leads():
            write_json(out, about | {"rows": rows})
            print(f"{resolution} px: measured", flush=True)
    return about | {"rows": rows}


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = ("pixels", "tokens", "way", "ms", "speed-up over one card", "ms of communication", "collectives")
    rows = [
        (
            row["resolution"],
            f"{row['tokens']:,}",
            row["way"],
            f"{row['ms']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['communication_ms']:.1f}",
            row["collectives"],
            None if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            f"{row['relative_error']:.1e}",
        )
        for row in sorted(result["rows"], key=lambda row: row["resolution"])
    ]
    return "\n".join(table((*columns, "peak MiB per card", "error"), rows))


def main() -> None:
    parser = command_line.parser("t5lib.benchmarks.several_gpus", str(__doc__))
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, after every resolution")
    parser.add_argument("--model", choices=SHAPES, default="sd35-medium", help="the model whose shape is timed")
    parser.add_argument("--layers", default="all", help="which attentions are converted, such as all or paper")
    parser.add_argument(
        "--resolutions",
        type=int,
        nargs="+",
        default=[2048, 4096],
        help="sides of the images in pixels, timed in this order",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed passes of each way")
    parser.add_argument("--small", action="store_true", help="use a small model instead, to see that everything works")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.small:
        sys.exit("several_gpus: no CUDA device, and on CPUs a pass of this model takes minutes; try --small")
    shape = SHAPES[args.model]
    if args.small:
        shape = replace(SHAPES["sd35-medium"], arguments=SMALL, text_tokens=20)
    try:
        config = TimingConfig(batch=shape.batch, repeats=args.repeats)
        result = run(args.out, args.resolutions, shape=shape, layers=args.layers, config=config)
    except T5Error as error:
        sys.exit(f"several_gpus: {error}")
    if processes.leads():
        print(report(result))


if __name__ == "__main__":
    main()
