"""A whole picture of Stable Diffusion 3.5 Medium's shape: seconds and GiB in the settings that users have.

    python -m t5lib.benchmarks.pictures --out pictures.json --sizes 1024 2048 --modes eager graphs --picture

The pipeline of diffusers with random weights draws a picture: text encoders once, with prompt and negative prompt; 28
steps with guidance; the VAE's decoder, in tiles above 2,048 px. The softmax model, with cuDNN attention first, and the
one with all attentions converted take turns, in bf16, in each of these modes:

    eager      nothing is compiled
    compiled   transformer.compile()
    graphs     transformer.compile(mode="reduce-overhead"): CUDA graphs
    float8     graphs, and the blocks' large linears in float8; needs torchao and a card that has float8
    cache      each block compiled, and diffusers' first-block cache, which skips blocks where little changes

A pass of the first three is checked against the same weights in higher precision before it is timed, and without that
there is no figure. float8 and the cache change the result: their rows give the error and pass no check. That of the
cache is of the latents after all steps, against those without it. With random weights neither this error nor the number
of steps that the cache computes in full says anything about real ones.

Where a picture takes more than ten seconds, three steps are timed and the others computed from them; the row says so.
With the cache all steps are drawn, because only then it is known which ones it skips.
GiB are what PyTorch holds of the card for one model, its encoders and its VAE, compilation and graphs included. The
file is written after every mode of a size, and rows with figures are not measured again. Without CUDA only --small
runs, to see that everything works.
"""

import copy
import functools
import gc
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from t5lib.benchmarks.picture_modes import CACHE, EAGER, FLOAT8, MODES, Drawing, missing
from t5lib.benchmarks.sd35_parts import CLIP_LENGTH, PARTS, T5_LENGTH, build_clip, build_t5, build_vae
from t5lib.benchmarks.shapes import SHAPES, Shape
from t5lib.benchmarks.timing import (
    Rules,
    allowed_error,
    attention_choice,
    cast_to,
    check_output,
    choose_dtype,
    describe_device,
    every_model_compiled,
    reference_output,
    relative_error,
    time_interleaved,
)
from t5lib.benchmarks.training_step import SMALL
from t5lib.conversion import convert
from t5lib.families.inputs import Inputs
from t5lib.layers.config import TTTConfig
from t5lib.report import plots
from t5lib.utils import command_line
from t5lib.utils.config import AtLeastOne, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from t5lib.utils.markdown import table

SOFTMAX, CONVERTED = "softmax", "all"
TIMED_STEPS = 3  # of a slow picture, and of the first one, which compiles and records
LARGEST_WHOLE = 2048  # pixels; above, the VAE decodes in tiles
GIB = 2**30


@settings
class PictureConfig:
    """How pictures are timed.

    Attributes:
        steps: of a picture.
        repeats: timed pictures of each model; medians count.
        slow: seconds; where a picture takes longer, TIMED_STEPS are timed, and with the cache one picture.
        threshold: of the cache: the change of the first block's output, relative, below which others are skipped.
    """

    steps: AtLeastOne = 28
    repeats: AtLeastOne = 3
    slow: float = 10.0
    threshold: float = 0.05


@dataclass(frozen=True)
class Studio:
    """What all rows share.

    Attributes:
        models: the originals by name, of which every mode takes copies.
        shared: the VAE, and the text encoders if they are measured.
        encode_s: seconds of the text encoders; None without.
    """

    models: dict[str, nn.Module]
    shape: Shape
    shared: nn.ModuleDict
    encode_s: float | None
    config: PictureConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def shared_gib(self) -> float:
        return sum(t.numel() * t.element_size() for t in self.shared.parameters()) / GIB

    def drawing(self, name: str, mode: str, size: int) -> Drawing:
        vae = self.shared["vae"]
        (vae.enable_tiling if size > LARGEST_WHOLE else vae.disable_tiling)()
        return Drawing(copy.deepcopy(self.models[name]), mode, vae, size, self.shape.text_tokens)

    def seconds(self, call: Callable[[], Any], *, warmup: int = 0, repeats: int = 1) -> float:
        [ms] = time_interleaved({"": call}, warmup=warmup, repeats=repeats, device=self.device).values()
        return statistics.median(ms) / 1e3


@dataclass(frozen=True)
class Exact:
    """What passes at one size are checked against: outputs in higher precision, by model, and the error allowed."""

    inputs: Inputs
    outputs: dict[str, Tensor]
    allowed: float

    @classmethod
    def at(cls, size: int, studio: Studio) -> "Exact":
        inputs = studio.drawing(SOFTMAX, EAGER, size).inputs()
        outputs = {name: reference_output(model, inputs) for name, model in studio.models.items()}
        return cls(inputs, outputs, allowed_error(studio.models[SOFTMAX], inputs, outputs[SOFTMAX], studio.dtype))


def make_studio(
    shape: Shape, parts: dict[str, Any], encoders: bool, config: PictureConfig, device: torch.device
) -> Studio:
    """Everything with random weights on the device, the encoders timed."""
    dtype = choose_dtype("auto", device)
    softmax = shape.make(device, dtype)
    models = {SOFTMAX: softmax, CONVERTED: convert(softmax, TTTConfig(layers="all")).eval()}
    torch.manual_seed(0)
    with device:
        shared = nn.ModuleDict({"vae": cast_to(build_vae(parts["vae"]), dtype)})
        if encoders:
            clips = [build_clip(sizes, parts["clip_vocabulary"]) for sizes in parts["clip"]]
            shared["encoders"] = nn.ModuleList(cast_to(each, dtype) for each in (*clips, build_t5(parts["t5"])))
    shared.to(device).requires_grad_(False).eval()
    studio = Studio(models, shape, shared, None, config, device, dtype)
    if not encoders:
        return studio
    call = functools.partial(_encode, shared["encoders"], device)
    return replace(studio, encode_s=studio.seconds(call, warmup=1, repeats=config.repeats))


def _encode(encoders: nn.ModuleList, device: torch.device) -> None:
    """Prompt and negative prompt, one after the other, as the pipeline does."""
    for _ in range(2):
        for encoder, length in zip(encoders, (CLIP_LENGTH, CLIP_LENGTH, T5_LENGTH), strict=True):
            encoder(torch.ones(1, length, dtype=torch.long, device=device))


def measure(names: Sequence[str], mode: str, size: int, exact: Callable[[], Exact], studio: Studio) -> list[dict]:
    """A row a model: figures, or why there are none."""
    common = {"size": size, "mode": mode}
    if why := missing(mode, studio.device, studio.shape.arguments["num_layers"]):
        return [common | {"model": name, "missing": why} for name in names]
    rules = Rules(studio.device, studio.dtype, compiled=mode != EAGER, graphs=False)
    drawings: dict[str, Drawing] = {}
    rows: dict[str, dict[str, Any]] = {}
    with every_model_compiled(rules):
        for name in names:
            try:
                drawings[name], rows[name] = prepared(name, mode, size, exact, studio)
            except Exception as error:  # of the compiler, of torchao, out of memory: the others' figures count
                traceback.print_exc()
                rows[name] = {"missing": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        time_pictures(drawings, rows, studio)
    drawings.clear()
    torch._dynamo.reset()  # compiled code holds the models, and graphs hold memory
    _free(studio.device)
    return [common | {"model": name} | row for name, row in rows.items()]


def prepared(
    name: str, mode: str, size: int, exact: Callable[[], Exact], studio: Studio
) -> tuple[Drawing, dict[str, Any]]:
    """A model that has drawn, with its error and its memory.

    Raises:
        T5Error: a wrong output.
    """
    if mode != CACHE:
        exact()  # before this model's memory is measured
    _free(studio.device)
    before = _held(studio.device)
    drawing = studio.drawing(name, mode, size)
    _free(studio.device)  # float8 has made weights smaller
    own = functools.partial(_most_held_since, before, studio)
    latents = drawing.latents(TIMED_STEPS)
    row: dict[str, Any] = {}
    if mode == CACHE:
        plain = drawing.latents(studio.config.steps)
        drawing.use_cache(studio.config.threshold)
        latents = drawing.latents(studio.config.steps)
        row |= {
            "threshold": studio.config.threshold,
            "error": relative_error(latents, plain.double()),
            "full_steps": drawing.full_steps,
        }
    row["denoise_gib"] = own()
    drawing.decoded(latents)
    row["gib"] = own()
    if mode != CACHE:
        output = drawing.model(**exact().inputs, return_dict=False)[0]
        allowed = float("inf") if mode == FLOAT8 else exact().allowed
        where = f"{name}, {mode}, at {size} px"
        row["error"] = check_output(
            output, studio.models[name], exact().inputs, where, allowed, reference=exact().outputs[name]
        )
    return drawing, row


def time_pictures(drawings: dict[str, Drawing], rows: dict[str, dict[str, Any]], studio: Studio) -> None:
    """Add the seconds of these models' pictures to their rows."""
    config = studio.config
    calls: dict[str, Callable[[], Any]] = {}
    repeats = config.repeats
    few = min(TIMED_STEPS, config.steps)
    for name, drawing in drawings.items():
        slow = studio.seconds(functools.partial(drawing.latents, few)) / few * config.steps > config.slow
        timed = few if slow else config.steps
        if slow and drawing.mode == CACHE:  # which steps are skipped is only known when all are drawn
            timed, repeats = config.steps, 1
        calls[name] = functools.partial(drawing.latents, timed)
        rows[name] |= {"steps": config.steps, "timed_steps": timed}
    runs = time_interleaved(calls, warmup=0, repeats=repeats, device=studio.device)
    for name, drawing in drawings.items():
        row, latents = rows[name], drawing.latents(1)
        whole = [ms / 1e3 / row["timed_steps"] * config.steps for ms in runs[name]]
        decode = studio.seconds(functools.partial(drawing.decoded, latents), repeats=config.repeats)
        row |= {"denoise_s": statistics.median(whole), "denoise_s_runs": whole, "decode_s": decode}
        row |= {"encode_s": studio.encode_s, "vae_tiled": drawing.size > LARGEST_WHOLE}
        row["seconds"] = row["denoise_s"] + decode + (studio.encode_s or 0)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _held(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _most_held_since(before: int, studio: Studio) -> float | None:
    """GiB of one model and of what is shared; None off CUDA."""
    if studio.device.type != "cuda":
        return None
    return (torch.cuda.max_memory_reserved(studio.device) - before) / GIB + studio.shared_gib


@torch.no_grad()
def run(
    out: Path,
    *,
    sizes: Sequence[int],
    modes: Sequence[str],
    names: Sequence[str] = (SOFTMAX, CONVERTED),
    encoders: bool = True,
    shape: Shape,
    parts: dict[str, Any],
    config: PictureConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Measure what is not in `out` yet; write and return everything.

    Args:
        names: of the models.
        parts: sizes of VAE and encoders (t5lib.benchmarks.sd35_parts.PARTS).

    Raises:
        T5Error: a mode that this device cannot have.
    """
    for mode in modes:
        missing(mode, device, shape.arguments["num_layers"])
    about: dict[str, Any] = {"device": describe_device(device)}
    about |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    about |= {"dtype": str(choose_dtype("auto", device)).removeprefix("torch."), "encoders": encoders}
    about |= {"batch": shape.batch, "steps": config.steps}
    about |= {"shape": {name: list(v) if isinstance(v, tuple) else v for name, v in shape.arguments.items()}}
    before = read_json(out) if out.exists() else {}
    rows = before.get("rows", []) if about.items() <= before.items() else []
    done = [row for row in rows if "missing" not in row and row.get("threshold") in (None, config.threshold)]
    known = {(row["size"], row["mode"], row["model"]) for row in done}
    studio = make_studio(shape, parts, encoders, config, device)
    with attention_choice(device):
        for size in sizes:
            exact = functools.cache(functools.partial(Exact.at, size, studio))
            for mode in modes:
                if known.issuperset((size, mode, name) for name in names):
                    continue
                kept = [row for row in rows if (row["size"], row["mode"]) != (size, mode) or row["model"] not in names]
                rows = kept + measure(names, mode, size, exact, studio)
                write_json(out, about | {"rows": rows})
                print(f"{size} px, {mode}: done", flush=True)
    return about | {"rows": rows}


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = ("pixels", "mode", "model", "seconds", "times softmax's speed", "denoise s", "decode s", "encode s")
    softmax = {_place(row): row["seconds"] for row in result["rows"] if row["model"] == SOFTMAX and "seconds" in row}
    rows = [
        (
            *(row["size"], row["mode"], row["model"]),
            *(_figures(row, softmax.get(_place(row))) if "seconds" in row else ["–"] * 8 + [row["missing"]]),
        )
        for row in sorted(result["rows"], key=lambda row: (row["size"], [*MODES].index(row["mode"])))
    ]
    return "\n".join(table((*columns, "GiB", "GiB to denoise", "error", "notes"), rows))


def _place(row: dict[str, Any]) -> tuple[int, str]:
    return row["size"], row["mode"]


def _figures(row: dict[str, Any], softmax: float | None) -> list[str | None]:
    notes = [f"from {row['timed_steps']} steps of {row['steps']}"] * (row["timed_steps"] < row["steps"])
    notes += ["decoded in tiles"] * row["vae_tiled"]
    if "full_steps" in row:
        notes.append(f"{row['full_steps']} steps of {row['steps']} computed in full (threshold {row['threshold']:g})")
        notes.append("error of the latents")
    return [
        f"{row['seconds']:.2f}",
        f"{softmax / row['seconds']:.2f}" if softmax else None,
        *(None if row[name] is None else f"{row[name]:.2f}" for name in ("denoise_s", "decode_s", "encode_s")),
        *(None if row[name] is None else f"{row[name]:.1f}" for name in ("gib", "denoise_gib")),
        f"{row['error']:.1e}",
        "; ".join(notes),
    ]


@plots.styled
def figure(result: dict[str, Any]) -> Figure:
    """Seconds of a picture against its size, a line a model and mode."""
    picture, axes = plots.new_axes(4.2, "A whole picture", "side in pixels (log scale)", "seconds (log scale)")
    shown = [row for row in result["rows"] if "seconds" in row]
    dashes = dict(zip(MODES, ("dotted", "dashed", "solid", "dashdot", (0, (5, 1, 1, 1, 1, 1))), strict=True))
    for name, label, colour in ((SOFTMAX, "softmax", plots.SOFTMAX), (CONVERTED, "T5", plots.T5)):
        for mode, dash in dashes.items():
            line = sorted((r["size"], r["seconds"]) for r in shown if (r["model"], r["mode"]) == (name, mode))
            if line:
                axes.plot(*zip(*line, strict=True), "o", ls=dash, ms=3, color=colour, label=f"{label}, {mode}")
    axes.set(xscale="log", yscale="log")
    sizes = sorted({row["size"] for row in shown})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    plots.plain_log_ticks(axes.yaxis)
    picture.legend(loc="outside lower center", ncols=2, handlelength=3)
    return picture


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.parser("t5lib.benchmarks.pictures", str(__doc__))
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, after every mode of a size")
    usual = PictureConfig()
    sides = [512, 1024, 1440, 2048, 4096]
    parser.add_argument("--sizes", type=int, nargs="+", default=sides, help="sides of the pictures in pixels")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="what is measured, in this order"
    )
    both = [SOFTMAX, CONVERTED]
    parser.add_argument("--models", nargs="+", choices=both, default=both, help="softmax, or all attentions converted")
    parser.add_argument("--blocks", type=int, help="take only this many blocks (default: all)")
    parser.add_argument("--repeats", type=int, default=usual.repeats, help="timed pictures of each model")
    parser.add_argument("--threshold", type=float, default=usual.threshold, help="of the cache; higher skips more")
    parser.add_argument("--no-encoders", action="store_true", help="leave the text encoders out, which take 11 GB")
    parser.add_argument("--picture", action="store_true", help="draw the seconds as a PNG file beside the JSON")
    parser.add_argument("--small", action="store_true", help="take a small model instead, to see that everything runs")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not args.small:
        sys.exit("pictures: no CUDA device, and on a CPU this model takes minutes a step; look at --small")
    shape, parts = SHAPES["sd35-medium"], PARTS["medium"]
    if args.small:
        shape, parts = replace(shape, arguments=SMALL, text_tokens=20), PARTS["tiny"]
    try:
        result = run(
            args.out,
            sizes=args.sizes,
            modes=args.modes,
            names=args.models,
            encoders=not args.no_encoders,
            shape=shape.shallower(args.blocks) if args.blocks else shape,
            parts=parts,
            config=PictureConfig(repeats=args.repeats, threshold=args.threshold),
            device=device,
        )
    except T5Error as error:
        sys.exit(f"pictures: {error}")
    print(report(result))
    if args.picture:
        plots.save(figure(result), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
