"""What training Stable Diffusion 3.5 Medium costs: seconds, share of the card's peak, and memory.

    python -m t5lib.benchmarks.training_step --out step_cost.json --sizes 512 1024 --layers softmax all
    python -m t5lib.benchmarks.training_step --out calibration.json --stages calibrate --sizes 1024 --layers all

Real stages (t5lib.train, t5lib.align, t5lib.calibrate) of the full shape with random weights, which cost what the real
ones do. Cases are measured one after another in one process; each is written as soon as it is known. A case whose
mixed-precision prediction is further from the float32 one than round-off explains is reported without figures.

Utilization is the FLOPs of the model over what the card could do in that time by its maker's peak of dense bf16. FLOPs
are those of matrix products and convolutions, counted in one forward pass (t5lib.benchmarks.resolution_sweep); a
backward pass counts twice as many, or as many where the large matrices are frozen. Passes that recompute count nothing.
"""

import contextlib
import gc
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from t5lib.benchmarks.resolution_sweep import count_flops
from t5lib.benchmarks.shapes import Shape
from t5lib.conversion import convert
from t5lib.data.batches import seeded
from t5lib.families.inputs import Inputs, first
from t5lib.families.sd3 import ADAPTER, MEDIUM
from t5lib.layers.config import TTTConfig
from t5lib.training.alignment import AlignConfig, align
from t5lib.training.calibration import calibrate
from t5lib.training.denoiser import DenoiserTrainConfig, Denoising
from t5lib.training.layer_groups import CalibrateConfig
from t5lib.training.objectives import Batch, RectifiedFlow, noised_inputs
from t5lib.training.trainer import compiled_blocks, train
from t5lib.utils import cards, command_line
from t5lib.utils.cards import GIB
from t5lib.utils.config import AtLeastOne, Positive, Several, Share, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json

PIXELS_PER_LATENT = 8
PAPER_STEPS = 3000
WARM_UP = 2  # steps: the first compiles, and tells "auto" what memory is needed; the second takes that memory
TOLERANCE = 5e-2  # of the prediction in bfloat16, relative to float32: round-off that grows through all blocks
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

Stage = Literal["calibrate", "align", "finetune"]


@settings
class CostConfig:
    """What is measured: every combination of stages, sizes, micro_batches, gradient_checkpointing, compile, optimizers
    and layers, in this order.

    Attributes:
        stages: "finetune" (t5lib.train), "align" and "calibrate". A calibration's optimizer is its own and it keeps
            activations; it and an alignment have no case "softmax".
        sizes: image sides in pixels.
        layers: "softmax" for the unconverted model, or a layer set of TTTConfig.
        compile, gradient_checkpointing, trainable: of the recipe (t5lib.training.recipe.LoopConfig); for an alignment,
            trainable "all" is "blocks".
        batch: images a step of a training. A calibration's step has one micro-batch.
        micro_batches: images a forward pass; None for 4 at 1024 px and as many tokens at others.
        text_tokens: of a caption: 77 of the CLIPs and 256 of T5.
        teacher: of the fine-tune: "none", "ema" or "source" (see DenoiserTrainConfig). The source's weights are in
            bfloat16 on CUDA, as are those of the teacher of an alignment and of a calibration.
        averaged: whether the fine-tune averages its weights.
        steps: timed steps after WARM_UP others; their median is reported, all are kept.
        pool, reuse: of the calibration's recipe (CalibrateConfig); pools: how many pools are timed, after one that
            compiles.
        recipe_steps: of the whole calibration, whose time is computed from these pools.
        blocks: the first so many blocks of the model; None for all.
        memory_gib: GiB of the card that may be used, to see what fits a smaller one; None for all.
        precision: "bf16" or "fp32".
    """

    stages: Several[Stage] = ("finetune",)
    sizes: Several[AtLeastOne] = (512, 1024, 2048)
    layers: Several[Literal["softmax", "paper", "all"]] = ("softmax", "paper", "all")
    compile: Several[bool] = (False, True)
    gradient_checkpointing: Several[bool | Share | Literal["auto"]] = ("auto",)
    optimizers: Several[Literal["adamw", "adamw8bit"]] = ("adamw",)
    trainable: Literal["all", "new", "lora"] = "all"
    batch: AtLeastOne = 16
    micro_batches: Several[AtLeastOne] | None = None
    text_tokens: AtLeastOne = 333
    teacher: Literal["none", "ema", "source"] = "ema"
    averaged: bool = True
    steps: AtLeastOne = 3
    pool: AtLeastOne = 4
    reuse: AtLeastOne = 4
    pools: AtLeastOne = 2
    recipe_steps: AtLeastOne = 2000  # of sd35-medium in params.yaml
    blocks: AtLeastOne | None = None
    memory_gib: Positive | None = None
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self):
        wrong = [size for size in self.sizes if size % (2 * PIXELS_PER_LATENT)]
        if wrong:
            raise T5Error(f"sizes {wrong}: expected multiples of {2 * PIXELS_PER_LATENT} pixels")
        for images in itertools.chain.from_iterable(map(self.images, self.sizes)):
            if self.batch % images:
                raise T5Error(
                    f"batch {self.batch}, micro_batch {images}: expected a batch that is a multiple of micro_batch"
                )

    def images(self, size: int) -> tuple[int, ...]:
        """Images a forward pass at `size` pixels, of every case."""
        return self.micro_batches or (max(1, min(self.batch, 4 * 1024**2 // size**2)),)

    def cases(self) -> Iterator[dict[str, Any]]:
        """What is measured, without figures."""
        for stage, size in itertools.product(self.stages, self.sizes):
            fit = stage == "calibrate"
            for images, again, compiled, optimizer, layers in itertools.product(
                self.images(size),
                (False,) if fit else self.gradient_checkpointing,
                self.compile,
                ("adam",) if fit else self.optimizers,
                [name for name in self.layers if name != "softmax" or stage == "finetune"],
            ):
                case = {"stage": stage, "size": size, "layers": layers, "compile": compiled, "optimizer": optimizer}
                yield case | {"micro_batch": images, "gradient_checkpointing": again}


def step_cost(
    config: CostConfig, *, out: Path | str, device: str | torch.device | None = None, shape: dict[str, Any] = MEDIUM
) -> dict[str, Any]:
    """Measure all cases and write them to `out` (JSON), each when it is done. Returns what was written.

    Args:
        device: where weights are made and trained; None for Accelerate's choice, the GPU where there is one.
        shape: arguments of SD3Transformer2DModel.

    Raises:
        T5Error: config.memory_gib without a CUDA device of that size.
    """
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if config.memory_gib:
        cards.limit_memory(config.memory_gib)
    if config.blocks:
        shape = Shape(ADAPTER, shape, config.text_tokens).shallower(config.blocks).arguments
    result: dict[str, Any] = {"settings": asdict(config), "shape": dict(shape)}
    result |= {"machine": _machine(device), "cases": []}
    for case in config.cases():
        case |= _measured(case, config, device, shape)
        softmax: dict[str, Any] = next((c for c in (*result["cases"], case) if _is_softmax_of(c, case)), {})
        if "seconds" in case and "seconds" in softmax:
            case["times_softmax"] = softmax["seconds"] / case["seconds"]
        result["cases"].append(case)
        write_json(out, result)
        print(", ".join(f"{name} {value}" for name, value in case.items() if name != "all_seconds"), flush=True)
    return result


def _is_softmax_of(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = ("stage", "size", "compile", "optimizer", "micro_batch", "gradient_checkpointing")
    return one["layers"] == "softmax" and all(one[name] == other[name] for name in names)


def _measured(case: dict[str, Any], config: CostConfig, device: torch.device, shape: dict[str, Any]) -> dict[str, Any]:
    """The figures of a case, or why there are none."""
    _free(device)
    try:
        return _run(case, config, device, shape)
    except torch.OutOfMemoryError:
        size = config.memory_gib or torch.cuda.mem_get_info(device)[1] / GIB
        return {"failed": f"out of memory, which is {size:.0f} GiB"}
    except T5Error as error:
        return {"failed": str(error)}


def _run(case: dict[str, Any], config: CostConfig, device: torch.device, shape: dict[str, Any]) -> dict[str, Any]:
    model, source = _model(case["layers"], shape, device), None
    if case["stage"] != "finetune" or config.teacher == "source":
        source = _model("softmax", shape, device)  # of the same weights
    batch = _batch(case["size"], case["micro_batch"], config.text_tokens, shape)
    compiled = case["compile"] and case["stage"] != "calibrate"  # which compiles no blocks
    error = _error(model, batch, config, compiled=compiled)
    if error > TOLERANCE:
        return {"failed": f"relative error {error:.2g} of the prediction, allowed {TOLERANCE}", "error": error}
    inputs = first(RectifiedFlow().noised(batch, seeded(1)).inputs, 1)
    forward = count_flops(model, inputs)
    teacher = forward if source is None else count_flops(source, inputs)
    if source is not None and config.precision == "bf16" and device.type == "cuda":
        source = source.to(torch.bfloat16)
    _free(device)
    if case["stage"] == "calibrate":
        return {"error": error, **_calibration(case, config, model, source, batch), **_peak(device)}
    times = _training(case, config, model, source, batch)
    seconds = statistics.median(times)
    backward = 2 if config.trainable == "all" else 1
    taught = case["stage"] == "align" or config.teacher != "none"
    flops = config.batch * ((1 + backward) * forward + taught * teacher)
    return {
        "seconds": seconds,
        "all_seconds": times,
        "hours_of_3000_steps": seconds * PAPER_STEPS / 3600,
        "teraflops": flops / 1e12,
        "utilization": _utilization(flops / seconds, device),
        "error": error,
        **_peak(device),
    }


def _training(
    case: dict[str, Any], config: CostConfig, model: nn.Module, source: nn.Module | None, batch: Batch
) -> list[float]:
    """Seconds of each timed step of a fine-tune or an alignment."""
    device, steps = next(model.parameters()).device, WARM_UP + config.steps
    recipe: dict[str, Any] = {
        "steps": steps,
        "batch_size": case["micro_batch"],
        "accumulate": config.batch // case["micro_batch"],
        "lr": 1e-6,  # the weights are random: nothing is to be learned, only done
        "lr_new": 1e-6,
        "gradient_checkpointing": case["gradient_checkpointing"],
        "optimizer": case["optimizer"],
        "precision": config.precision,
        "compile": case["compile"],
    }
    marks: list[float] = []

    def mark(_values: dict[str, float], _step: int) -> None:
        marks.append(_now(device))

    if case["stage"] == "align":
        trainable: Any = "blocks" if config.trainable == "all" else config.trainable
        align_config = AlignConfig(**recipe, trainable=trainable)
        align(model, teacher=source, batches=_noised(batch), config=align_config, log=mark)  # type: ignore[arg-type]
    else:
        recipe |= {"align": float(config.teacher != "none"), "trainable": config.trainable}
        recipe |= {"teacher": "source" if source is not None else "ema"}
        train_config = DenoiserTrainConfig(**recipe, ema=0.999 if config.averaged else None)
        objective = Denoising(train_config, RectifiedFlow(), source)
        train(model, lambda _: itertools.repeat(batch), objective, train_config, steps=steps, log=mark)
    return [after - before for before, after in itertools.pairwise(marks[WARM_UP - 1 :])]


def _calibration(
    case: dict[str, Any], config: CostConfig, model: nn.Module, source: Any, batch: Batch
) -> dict[str, Any]:
    """Seconds of a step, those of a pool of steps together with its passes of the teacher, and of the whole recipe."""
    device, a_pool = next(model.parameters()).device, config.pool * config.reuse
    steps = (1 + config.pools) * a_pool + 1  # the last one asks for another pool, and so tells when the one before ends
    marks: list[float] = []

    def batches(start: int) -> Iterator[Inputs]:
        for number, inputs in enumerate(_noised(batch)(start), start):
            if number and (number - 1) % config.pool == 0:  # the first batch is measured on
                marks.append(_now(device))
            yield inputs

    recipe = CalibrateConfig(
        steps=steps,
        batch_size=case["micro_batch"],
        pool=config.pool,
        reuse=config.reuse,
        compile=case["compile"],
    )
    begun = _now(device)
    calibrate(model, teacher=source, batches=batches, config=recipe)
    whole = _now(device) - begun
    times = [(after - before) / a_pool for before, after in itertools.pairwise(marks[1:])]
    seconds = statistics.median(times)
    once = whole - steps * seconds
    return {
        "seconds": seconds,
        "all_seconds": times,
        "seconds_a_block": seconds / len(list(ADAPTER.blocks(model))),
        "seconds_once": once,  # checks, errors before and after, compilation
        "recipe_steps": config.recipe_steps,
        "recipe_seconds": once + config.recipe_steps * seconds,
        "extrapolated": steps < config.recipe_steps,
    }


def _noised(batch: Batch) -> Callable[..., Iterator[Inputs]]:
    return noised_inputs(lambda _: itertools.repeat(batch), RectifiedFlow(), seed=0)  # type: ignore[return-value]


def _utilization(flops_a_second: float, device: torch.device) -> float | None:
    """The part of the card's peak; None where that is not known."""
    card = cards.present() if device.type == "cuda" else None
    return flops_a_second / card.flops if card and card.flops else None


def _now(device: torch.device) -> float:
    """Seconds, when all that the device was told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def _again(text: str) -> bool | float | str:
    """A value of gradient_checkpointing."""
    words: dict[str, bool | str] = {"on": True, "off": False, "auto": "auto"}
    return words[text] if text in words else float(text)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.parser("t5lib.benchmarks.training_step", str(__doc__))
    usual = CostConfig()
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, after every case")
    parser.add_argument("--stages", nargs="+", default=usual.stages, help="calibrate, align, finetune")
    parser.add_argument("--sizes", type=int, nargs="+", default=usual.sizes, help="image sides in pixels")
    parser.add_argument("--layers", nargs="+", default=usual.layers, help="models to measure: softmax, paper, all")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="both", help="whether to torch.compile")
    parser.add_argument(
        "--gradient-checkpointing",
        type=_again,
        nargs="+",
        default=usual.gradient_checkpointing,
        help="on, off, auto or a share of the blocks, from 0 to 1",
    )
    parser.add_argument("--optimizers", nargs="+", help="adamw, adamw8bit; the default is those that are installed")
    parser.add_argument(
        "--trainable", choices=("all", "new", "lora"), default=usual.trainable, help="what a training changes"
    )
    parser.add_argument("--batch", type=int, default=usual.batch, help="images per training step")
    parser.add_argument(
        "--micro-batches",
        type=int,
        nargs="+",
        help="images per forward pass; fewer need less memory (default: 4 at 1024 px, as many tokens at others)",
    )
    parser.add_argument(
        "--teacher", choices=("none", "ema", "source"), default=usual.teacher, help="teacher of the fine-tune"
    )
    parser.add_argument("--not-averaged", action="store_true", help="fine-tune without averaged weights")
    parser.add_argument("--steps", type=int, default=usual.steps, help="timed steps of each training")
    parser.add_argument("--pool", type=int, default=usual.pool, help="batches in a calibration's pool")
    parser.add_argument("--pools", type=int, default=usual.pools, help="timed pools of each calibration")
    parser.add_argument(
        "--recipe-steps", type=int, default=usual.recipe_steps, help="steps of the calibration whose time is computed"
    )
    parser.add_argument("--text-tokens", type=int, default=usual.text_tokens, help="tokens of a caption")
    parser.add_argument("--blocks", type=int, help="take the first blocks of the model alone (default: all 24)")
    parser.add_argument(
        "--memory-gib", type=float, help="use at most so much of the card, as a smaller one has (default: all)"
    )
    parser.add_argument("--small", action="store_true", help="take a small model instead, to see that everything runs")
    given = vars(parser.parse_args(arguments))
    out, shape = given.pop("out"), SMALL if given.pop("small") else MEDIUM
    installed = ("adamw", "adamw8bit") if importlib.util.find_spec("bitsandbytes") else ("adamw",)
    given["optimizers"] = given["optimizers"] or installed
    given["compile"] = {"off": (False,), "on": (True,), "both": (False, True)}[given["compile"]]
    given["averaged"] = not given.pop("not_averaged")
    step_cost(CostConfig(**given), out=out, shape=shape)


if __name__ == "__main__":
    main()
