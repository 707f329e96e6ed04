"""What a training step of Stable Diffusion 3.5 Medium costs: seconds and memory, softmax beside converted.

    python -m t5lib.benchmarks.training_step --out step_cost.json --sizes 512 1024 --layers softmax all

Real training (t5lib.training.denoiser) of the full shape with random weights, which cost what the real ones do. Cases
are measured one after another in one process; each is written as soon as it is known. A case whose mixed-precision
prediction is further from the float32 one than round-off explains is reported without figures.
"""

import contextlib
import gc
import importlib.util
import itertools
import statistics
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from t5lib.conversion import convert
from t5lib.data.batches import seeded
from t5lib.families.sd3 import ADAPTER, MEDIUM
from t5lib.layers.config import TTTConfig
from t5lib.training.denoiser import DenoiserTrainConfig, Denoising
from t5lib.training.objectives import Batch, RectifiedFlow
from t5lib.training.trainer import compiled_blocks, train
from t5lib.utils import command_line
from t5lib.utils.config import AtLeastOne, Several, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json

PIXELS_PER_LATENT = 8
PAPER_STEPS = 3000
TOLERANCE = 5e-2  # of the prediction in bfloat16, relative to float32: round-off that grows through all blocks
GIB = 2**30
SMALL = MEDIUM | {  # the same parts, for a look at whether all runs
    "num_layers": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 32,
    "dual_attention_layers": (0, 1, 2),
}


@settings
class CostConfig:
    """What is measured: every combination of sizes, compile, optimizers and layers, in this order.

    Attributes:
        sizes: image sides in pixels.
        layers: "softmax" for the unconverted model, or a layer set of TTTConfig.
        batch: images a step; micro_batch: images a forward pass, None for 4 at 1024 px and as many tokens at others.
        text_tokens: of a caption: 77 of the CLIPs and 256 of T5.
        teacher: of the alignment: "none", "ema" or "source" (see DenoiserTrainConfig).
        steps: timed steps after one that warms up and compiles; their median is reported, all are kept.
        precision: "bf16" or "fp32".
    """

    sizes: Several[AtLeastOne] = (512, 1024, 2048)
    layers: Several[Literal["softmax", "paper", "all"]] = ("softmax", "paper", "all")
    compile: Several[bool] = (False, True)
    optimizers: Several[Literal["adamw", "adamw8bit"]] = ("adamw",)
    batch: AtLeastOne = 16
    micro_batch: AtLeastOne | None = None
    text_tokens: AtLeastOne = 333
    teacher: Literal["none", "ema", "source"] = "ema"
    steps: AtLeastOne = 3
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = True

    def __post_init__(self):
        wrong = [size for size in self.sizes if size % (2 * PIXELS_PER_LATENT)]
        if wrong:
            raise T5Error(f"sizes {wrong}: expected multiples of {2 * PIXELS_PER_LATENT} pixels")
        for size in self.sizes:
            if self.batch % self.images(size):
                raise T5Error(
                    f"batch {self.batch}, micro_batch {self.images(size)}: expected a batch that is a multiple of "
                    "micro_batch"
                )

    def images(self, size: int) -> int:
        """Images a forward pass at `size` pixels."""
        return self.micro_batch or max(1, min(self.batch, 4 * 1024**2 // size**2))


def step_cost(
    config: CostConfig, *, out: Path | str, device: str | torch.device | None = None, shape: dict[str, Any] = MEDIUM
) -> dict[str, Any]:
    """Measure all cases and write them to `out` (JSON), each when it is done. Returns what was written.

    Args:
        device: where weights are made and trained; None for Accelerate's choice, the GPU where there is one.
        shape: arguments of SD3Transformer2DModel.
    """
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    result: dict[str, Any] = {"settings": asdict(config), "shape": dict(shape)}
    result |= {"machine": _machine(device), "cases": []}
    for size, compiled, optimizer, layers in itertools.product(
        config.sizes, config.compile, config.optimizers, config.layers
    ):
        case = {"size": size, "layers": layers, "compile": compiled, "optimizer": optimizer}
        case |= _measured(case, config, device, shape)
        softmax: dict[str, Any] = next((c for c in (*result["cases"], case) if _is_softmax_of(c, case)), {})
        if "seconds" in case and "seconds" in softmax:
            case["times_softmax"] = softmax["seconds"] / case["seconds"]
        result["cases"].append(case)
        write_json(out, result)
        print(", ".join(f"{name} {value}" for name, value in case.items() if name != "all_seconds"), flush=True)
    return result


def _is_softmax_of(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["layers"] == "softmax" and all(one[n] == other[n] for n in ("size", "compile", "optimizer"))


def _measured(case: dict[str, Any], config: CostConfig, device: torch.device, shape: dict[str, Any]) -> dict[str, Any]:
    """The figures of a case, or why there are none."""
    _free(device)
    try:
        return _run(case, config, device, shape)
    except torch.OutOfMemoryError:
        return {"failed": f"out of memory, which is {torch.cuda.mem_get_info(device)[1] / GIB:.0f} GiB"}
    except T5Error as error:
        return {"failed": str(error)}


def _run(case: dict[str, Any], config: CostConfig, device: torch.device, shape: dict[str, Any]) -> dict[str, Any]:
    size, images = case["size"], config.images(case["size"])
    model, source = _model(case["layers"], shape, device), None
    batch = _batch(size, images, config.text_tokens, shape)
    error = _error(model, batch, config, compiled=case["compile"])
    if error > TOLERANCE:
        return {"failed": f"relative error {error:.2g} of the prediction, allowed {TOLERANCE}", "error": error}
    if config.teacher == "source":
        source = _model("softmax", shape, device)
    recipe = DenoiserTrainConfig(
        steps=1 + config.steps,
        batch_size=images,
        accumulate=config.batch // images,
        lr=1e-6,  # the weights are random: nothing is to be learned, only done
        lr_new=1e-6,
        align=0.0 if config.teacher == "none" else 1.0,
        teacher="ema" if config.teacher == "none" else config.teacher,
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer=case["optimizer"],
        precision=config.precision,
        compile=case["compile"],
    )
    marks: list[float] = []

    def mark(_values: dict[str, float], _step: int) -> None:
        _wait(device)
        marks.append(time.perf_counter())

    _free(device)
    objective = Denoising(recipe, RectifiedFlow(), source)
    train(model, lambda _: itertools.repeat(batch), objective, recipe, steps=recipe.steps, log=mark)
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    middle = statistics.median(seconds)
    return {
        "micro_batch": images,
        "seconds": middle,
        "all_seconds": seconds,
        "hours_of_3000_steps": middle * PAPER_STEPS / 3600,
        "error": error,
        **_peak(device),
    }


def _model(layers: str, shape: dict[str, Any], device: torch.device) -> nn.Module:
    """With random weights in float32, made where they are used."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = SD3Transformer2DModel(**shape)
    model = model.to(device)  # the position table is made on the CPU
    return model if layers == "softmax" else convert(model, TTTConfig(layers=layers), inplace=True)


def _batch(size: int, images: int, text_tokens: int, shape: dict[str, Any]) -> Batch:
    draw, side = seeded(0), size // PIXELS_PER_LATENT
    return {
        "latents": torch.randn(images, shape.get("in_channels", 16), side, side, generator=draw),
        "prompt_embeds": torch.randn(images, text_tokens, shape["joint_attention_dim"], generator=draw),
        "pooled": torch.randn(images, shape["pooled_projection_dim"], generator=draw),
    }


def _error(model: nn.Module, batch: Batch, config: CostConfig, *, compiled: bool) -> float:
    """Of the prediction as it is trained (precision, compiled or not), relative to plain float32."""
    device = next(model.parameters()).device
    noised = RectifiedFlow().noised(batch, seeded(1)).to(device)
    with torch.no_grad():
        expected = ADAPTER.call(model.train(), noised.inputs)
        with compiled_blocks(model) if compiled else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = ADAPTER.call(model, noised.inputs)
    return ((output.float() - expected).norm() / expected.norm()).item()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> dict[str, float | None]:
    """GiB in tensors at the fullest moment of the training, and GiB that PyTorch held of the device for them."""
    if device.type != "cuda":
        return {"peak_gib": None, "reserved_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name} | {package: version(package) for package in ("torch", "diffusers")}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.parser("t5lib.benchmarks.training_step", str(__doc__))
    usual = CostConfig()
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, after every case")
    parser.add_argument("--sizes", type=int, nargs="+", default=usual.sizes, help="image sides in pixels")
    parser.add_argument("--layers", nargs="+", default=usual.layers, help="models to measure: softmax, paper, all")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="both", help="whether to torch.compile")
    parser.add_argument("--optimizers", nargs="+", help="adamw, adamw8bit; the default is those that are installed")
    parser.add_argument("--batch", type=int, default=usual.batch, help="images per step")
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="images per forward pass; fewer need less memory (default: 4 at 1024 px, as many tokens at others)",
    )
    parser.add_argument(
        "--teacher", choices=("none", "ema", "source"), default=usual.teacher, help="teacher of the alignment"
    )
    parser.add_argument("--steps", type=int, default=usual.steps, help="timed steps of each case")
    parser.add_argument("--text-tokens", type=int, default=usual.text_tokens, help="tokens of a caption")
    parser.add_argument("--small", action="store_true", help="take a small model instead, to see that everything runs")
    given = parser.parse_args(arguments)
    installed: tuple[Literal["adamw", "adamw8bit"], ...] = ("adamw",)
    if importlib.util.find_spec("bitsandbytes"):
        installed = ("adamw", "adamw8bit")
    config = CostConfig(
        sizes=tuple(given.sizes),
        layers=tuple(given.layers),
        compile={"off": (False,), "on": (True,), "both": (False, True)}[given.compile],
        optimizers=tuple(given.optimizers or installed),
        batch=given.batch,
        micro_batch=given.micro_batch,
        teacher=given.teacher,
        steps=given.steps,
        text_tokens=given.text_tokens,
    )
    step_cost(config, out=given.out, shape=SMALL if given.small else MEDIUM)


if __name__ == "__main__":
    main()
