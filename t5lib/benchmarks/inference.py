"""Speed of a denoiser in the shape of Stable Diffusion 3.5 Medium, softmax beside converted, with random weights.

    python -m t5lib.benchmarks.inference --out docs/results/sd35-speed.json [--resolutions 1024 2048 512 4096]

Weights do not matter to speed, and the real ones are gated. Everything is compared in one run: the softmax model with
cuDNN attention first, the paper's 18 attentions converted, all converted, and "rest": all mixing taken out, which no
attention can beat. All of them compiled block by block, in bf16. Each is checked against its own weights in higher
precision before it is timed, twice: as a CUDA graph, which is the device's own time, and launched from Python, which
is slower where Python is. Needs CUDA; written after every resolution, and those that are in the file are not run again.
"""

import argparse
import copy
import functools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from t5kernels.bench import graphed
from torch import Tensor, nn

import t5lib
from t5lib.benchmarks.inputs import at_resolution, num_tokens, output_of, placed, random_inputs
from t5lib.benchmarks.resolution_sweep import (
    KINDS_OF_BLOCKS,
    attention_choice,
    check_output,
    compile_model,
    describe_device,
    peak_mib,
    time_interleaved,
)
from t5lib.conversion import ttt_layers
from t5lib.families.sd3 import MEDIUM
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json

# Times as fast as softmax: what the project asks for at least, and aims at.
TARGETS = {("paper", 1024): (1.14, None), ("paper", 2048): (1.42, None)}
TARGETS |= {("all", 1024): (1.42, 1.55), ("all", 2048): (3.0, 3.3)}
BATCH = 2  # guidance: with and without the prompt


class Unmixed(nn.Module):
    """In a mixer's place: nothing is mixed, and no projection or norm is idle."""

    takes_norms = False

    def prepare(self, x: Tensor, grid: Any) -> Tensor:
        return x

    def joint(self, image: tuple[Tensor, ...], text: tuple[Tensor, ...] | None, grid: Any) -> tuple:
        return sum(image), None if text is None else sum(text)


def models(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """By name; the converted ones carry the softmax model's weights."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        softmax = nn.Module.to(SD3Transformer2DModel(**shape), dtype).eval()
    found = {"softmax": softmax}
    for name in ("paper", "all"):
        found[name] = t5lib.convert(softmax, TTTConfig(layers=name)).eval()
    found["rest"] = copy.deepcopy(found["all"])
    for layer in ttt_layers(found["rest"]).values():
        layer.mixer = Unmixed()
    return found


def measure(
    known: dict[str, nn.Module], resolution: int, device: torch.device, dtype: torch.dtype, repeats: int, compiled: bool
) -> list[dict[str, Any]]:
    """A row a model.

    Raises:
        T5Error: a wrong output: no speed is given for it.
    """
    inputs = random_inputs(at_resolution(known["softmax"], resolution), resolution, BATCH)
    inputs = placed(inputs, device, dtype)
    torch._dynamo.reset()
    kinds = torch._dynamo.config.patch(recompile_limit=KINDS_OF_BLOCKS)
    with torch.inference_mode(), attention_choice(device), kinds:
        runnable, errors = {}, {}
        for name, model in known.items():
            own = copy.deepcopy(model)
            runnable[name] = compile_model(own, inputs) if compiled else own
            errors[name] = check_output(runnable[name], model, inputs, f"{name} at {resolution} px")
            print(f"{resolution} px, {name}: ready, {errors[name]:.1e} off", flush=True)
        calls = {name: functools.partial(output_of, model, inputs) for name, model in runnable.items()}
        launched = time_interleaved(calls, warmup=2, repeats=repeats, device=device)
        peaks = {name: peak_mib(call, runnable[name], device) for name, call in calls.items()}
        runs = launched
        if device.type == "cuda":
            graphs = {name: graphed(call) for name, call in calls.items()}
            runs = time_interleaved(graphs, warmup=2, repeats=repeats, device=device)
    fastest = statistics.median(runs["softmax"])
    targets = TARGETS if known["softmax"].config.num_layers == MEDIUM["num_layers"] else {}
    return [
        {
            "resolution": resolution,
            "tokens": num_tokens(known["softmax"], inputs),
            "model": name,
            "ms": statistics.median(times),
            "ms_runs": times,
            "launched_ms": statistics.median(launched[name]),
            "launched_ms_runs": launched[name],
            "speedup": fastest / statistics.median(times),
            "target": targets.get((name, resolution)),
            "peak_mib": peaks[name],
            "relative_error": errors[name],
        }
        for name, times in runs.items()
    ]


def run(
    out: Path, resolutions: list[int], *, device: torch.device, dtype: torch.dtype, shape: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Measure what is not in `out` yet; returns and writes all of it."""
    compiled = device.type == "cuda"
    settings = {"device": describe_device(device), "torch": torch.__version__, "batch": BATCH, "compile": compiled}
    settings |= {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {k: list(v) if isinstance(v, tuple) else v for k, v in shape.items()},
    }
    before = read_json(out) if out.exists() else {}
    rows = before.get("rows", []) if all(before.get(key) == value for key, value in settings.items()) else []
    known = models(shape, device, dtype)
    for resolution in resolutions:
        if resolution not in {row["resolution"] for row in rows}:
            rows = rows + measure(known, resolution, device, dtype, repeats, compiled)
            write_json(out, settings | {"rows": rows})
    return settings | {"rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| pixels | tokens | model | ms | times softmax's speed | asked, aimed at | best possible "
        "| ms launched from Python | peak MiB | error |"
    ]
    lines.append("|---" * 10 + "|")
    best = {row["resolution"]: row["speedup"] for row in result["rows"] if row["model"] == "rest"}
    for row in sorted(result["rows"], key=lambda row: row["resolution"]):
        asked = ", ".join(f"{value:g}" for value in row["target"] or () if value)
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        cells = (row["resolution"], f"{row['tokens']:,}", row["model"], f"{row['ms']:.1f}", f"{row['speedup']:.2f}")
        cells += (
            asked,
            f"{best[row['resolution']]:.2f}",
            f"{row['launched_ms']:.1f}",
            peak,
            f"{row['relative_error']:.1e}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def shallower(blocks: int) -> dict[str, Any]:
    """SD3.5-Medium's first blocks."""
    return MEDIUM | {
        "num_layers": blocks,
        "dual_attention_layers": tuple(i for i in MEDIUM["dual_attention_layers"] if i < blocks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m t5lib.benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[1024, 2048, 512, 4096], help="in this order")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=MEDIUM["num_layers"], help="fewer, where a pass takes seconds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("speed: no CUDA device, and on a CPU this model takes minutes a pass; run it where there is one")
    try:
        given = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "repeats": args.repeats}
        print(table(run(args.out, args.resolutions, shape=shallower(args.blocks), **given)))
    except T5Error as error:
        sys.exit(f"speed: {error}")


if __name__ == "__main__":
    main()
