"""Speed of a denoiser in a published shape (t5lib.benchmarks.shapes), softmax beside converted, with random weights.

    python -m t5lib.benchmarks.inference --out docs/results/sd35-speed.json --resolutions 1024 2048
    python -m t5lib.benchmarks.inference --out docs/results/flux-speed.json --model flux-dev

One run compares the softmax model (with cuDNN attention where it can be used); the model with the paper's attentions
converted, if the paper names some (18 of Stable Diffusion 3.5 Medium); the model with all converted; and "rest",
without any attention, which no attention can beat. All are compiled in bf16, block by block or with --whole as a whole.
The output of each is checked against the same weights in higher precision. Then each is timed twice: as a CUDA graph,
which gives the device's own time, and launched from Python, which may take longer. This needs CUDA. The file is written
after every resolution, and resolutions that are in it are not run again.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.benchmarks.shapes import SHAPES, Shape
from t5lib.benchmarks.timing import Rules, TimingConfig, describe_device, time_models
from t5lib.conversion import convert, ttt_layers
from t5lib.families.inputs import ExampleSize
from t5lib.layers.config import TTTConfig
from t5lib.utils import command_line
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from t5lib.utils.markdown import table

SD35, SOFTMAX, REST = "sd35-medium", "softmax", "rest"
# Times as fast as softmax, of SD35: what the project asks for at least, and aims at.
TARGETS: dict[tuple[str, int], tuple[float, float | None]] = {
    ("paper", 1024): (1.14, None),
    ("paper", 2048): (1.42, None),
    ("all", 1024): (1.42, 1.55),
    ("all", 2048): (3.0, 3.3),
}


class Unmixed(nn.Module):
    """In a mixer's place: nothing is mixed, and no projection or norm is idle."""

    takes_norms = False

    def prepare(self, x: Tensor, grid: Any) -> Tensor:
        return x

    def joint(self, image: tuple[Tensor, ...], text: tuple[Tensor, ...] | None, grid: Any) -> tuple:
        return sum(image), None if text is None else sum(text)


def models(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The models by name; the converted ones carry the softmax model's weights."""
    softmax = shape.make(device, dtype)
    every = {SOFTMAX: softmax}
    for name in sorted(shape.family.layer_sets(softmax), reverse=True):  # "paper", where there is one, then "all"
        every[name] = convert(softmax, TTTConfig(layers=name)).eval()
    every[REST] = copy.deepcopy(every["all"])
    for layer in ttt_layers(every[REST]).values():
        layer.mixer = Unmixed()
    return every


def measure(
    known: dict[str, nn.Module], shape: Shape, resolution: int, config: TimingConfig, rules: Rules
) -> list[dict[str, Any]]:
    """A row a model.

    Raises:
        T5Error: a wrong output: no speed is given for it.
    """
    softmax = known["softmax"]
    size = ExampleSize(resolution, config.batch, text_tokens=shape.text_tokens)
    inputs = shape.family.example_inputs(softmax, size)
    yardsticks = {name: name if name == REST else SOFTMAX for name in known}
    times = time_models(known, inputs, config, rules, f"at {resolution} px", yardsticks)
    targets = TARGETS if shape == SHAPES[SD35] else {}
    return [
        {
            "resolution": resolution,
            "tokens": shape.family.num_tokens(softmax, inputs),
            "model": name,
            "ms": time.ms,
            "ms_runs": time.ms_runs,
            "launched_ms": time.launched_ms or time.ms,
            "launched_ms_runs": time.launched_runs or time.ms_runs,
            "speedup": times[SOFTMAX].ms / time.ms,
            "target": targets.get((name, resolution)),
            "peak_mib": time.peak_mib,
            "relative_error": time.relative_error,
        }
        for name, time in times.items()
    ]


def run(
    out: Path,
    resolutions: list[int],
    *,
    device: torch.device,
    shape: Shape,
    config: TimingConfig,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure what is not in `out` yet; write and return everything. `names`: the models to measure; None for all."""
    rules = Rules.of(config, device)
    about = {"device": describe_device(device), "torch": torch.__version__, "batch": config.batch}
    about |= {"compile": rules.compiled and ("whole" if config.whole else "by block")}
    about |= {"dtype": str(rules.dtype).removeprefix("torch.")}
    about |= {"denoiser": shape.family.name}
    about |= {"shape": {name: list(v) if isinstance(v, tuple) else v for name, v in shape.arguments.items()}}
    before = read_json(out) if out.exists() else {}
    rows = before.get("rows", []) if about.items() <= before.items() else []
    known = models(shape, device, rules.dtype)
    if names:
        known = {name: model for name, model in known.items() if name == SOFTMAX or name in names}
    for resolution in resolutions:
        if resolution not in {row["resolution"] for row in rows}:
            rows = rows + measure(known, shape, resolution, config, rules)
            write_json(out, about | {"rows": rows})
            print(f"{resolution} px: measured", flush=True)
    return about | {"rows": rows}


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    best = {row["resolution"]: row["speedup"] for row in result["rows"] if row["model"] == REST}
    columns = ("pixels", "tokens", "model", "ms", "times softmax's speed", "asked, aimed at", "best possible")
    rows = [
        (
            row["resolution"],
            f"{row['tokens']:,}",
            row["model"],
            f"{row['ms']:.1f}",
            f"{row['speedup']:.2f}",
            ", ".join(f"{value:g}" for value in row["target"] or () if value),
            f"{best[row['resolution']]:.2f}" if best else None,
            f"{row['launched_ms']:.1f}",
            None if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            f"{row['relative_error']:.1e}",
        )
        for row in sorted(result["rows"], key=lambda row: row["resolution"])
    ]
    return "\n".join(table((*columns, "ms launched from Python", "peak MiB", "error"), rows))


def main() -> None:
    parser = command_line.parser("t5lib.benchmarks.inference", str(__doc__))
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, after every resolution")
    parser.add_argument("--model", choices=SHAPES, default=SD35, help="whose shape the model has")
    sides = [1024, 2048, 512, 4096]
    parser.add_argument(
        "--resolutions", type=int, nargs="+", default=sides, help="sides of the images in pixels, in this order"
    )
    parser.add_argument("--models", nargs="+", help="only these and softmax (default: all)")
    parser.add_argument("--repeats", type=int, default=10, help="timed passes")
    parser.add_argument(
        "--blocks", type=int, help="take only this many blocks, if the model is too large or slow (default: all)"
    )
    parser.add_argument("--whole", action="store_true", help="compile each model as a whole, which takes minutes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("inference: no CUDA device, and on a CPU this model takes minutes a pass; run it where there is one")
    try:
        shape = SHAPES[args.model].shallower(args.blocks) if args.blocks else SHAPES[args.model]
        config = TimingConfig(batch=shape.batch, repeats=args.repeats, whole=args.whole)
        result = run(
            *(args.out, args.resolutions),
            device=torch.device("cuda"),
            shape=shape,
            config=config,
            names=args.models,
        )
        print(report(result))
    except T5Error as error:
        sys.exit(f"inference: {error}")


if __name__ == "__main__":
    main()
