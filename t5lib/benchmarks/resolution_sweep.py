"""Softmax and converted model side by side: FLOPs, latency and memory against resolution, each figure checked.

Both models get the same treatment: same weights at every resolution, same dtype, same compilation, rounds that
alternate between them. The softmax side is PyTorch's fused attention (on CUDA cuDNN's first, then flash), the
strongest baseline at hand.
"""

import copy
import functools
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t5lib.benchmarks.inputs import at_resolution, cast_to, first, leading, num_tokens, output_of, placed, random_inputs
from t5lib.data.batches import Inputs
from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error

# Relative error allowed against the model's own float64 output: round-off that grows through all layers, no more.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
CHECKED_IMAGES = 2
MOST_IN_FLOAT64 = 8192  # tokens of a denoiser
KINDS_OF_BLOCKS = 64  # that torch.compile may meet in one model


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
        resolutions: image sides in pixels, each a multiple of the patch size.
        batch: images a forward pass.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        warmup: untimed passes of each model at each resolution.
        repeats: timed passes of each model at each resolution; the median is reported, all are kept.
        compile: torch.compile both models (a denoiser's blocks one by one); None means on CUDA only.
        pixels_per_latent: of a denoiser: pixels that one latent is wide; 1 where pixels are the latents.
        text_tokens: of a denoiser that takes text.
    """

    resolutions: tuple[int, ...] = (98, 224, 392, 518)
    batch: int = 1
    dtype: str = "auto"
    warmup: int = 1
    repeats: int = 5
    compile: bool | None = None
    pixels_per_latent: int = 8
    text_tokens: int = 333

    def __post_init__(self):
        if not self.resolutions or min(self.resolutions) < 1:
            raise T5Error(f"resolutions {list(self.resolutions)}: expected at least one positive image side in pixels")
        one_of(self.dtype, ("auto", "float32", "float16", "bfloat16"), "dtype")
        for name, least in (("batch", 1), ("warmup", 0), ("repeats", 1), ("pixels_per_latent", 1), ("text_tokens", 1)):
            if getattr(self, name) < least:
                raise T5Error(f"{name} is {getattr(self, name)}; expected at least {least}")


def benchmark(
    softmax: nn.Module,
    converted: nn.Module,
    config: BenchmarkConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure a model and its converted twin at every resolution.

    Args:
        softmax, converted: models of one family and the same input (t5lib.convert); neither is changed.
        on_row: called with each finished row, to show progress.

    Returns:
        JSON-ready: device, dtype, torch, compile, threads, batch, warmup, repeats; `rows`, one a resolution and
        model ("softmax" or "t5"), with resolution, tokens, batch, ms (median of ms_runs), images_per_second,
        peak_mib (weights and activations of one pass, None off CUDA), gflops (a pass of the whole batch; one
        multiply-add counts as 2, matrix products and convolutions only), relative_error and reference (the precision
        it is against); break_even_tokens and break_even_tokens_flops (see `break_even_tokens`); `checked`, what
        relative_error was measured against.

    Raises:
        T5Error: a resolution that is no multiple of the patch size, or a model whose output in this dtype is not
            finite or is further than the tolerance from its own in `reference_dtype`: wrong results get no speed.
    """
    config, device = config or BenchmarkConfig(), torch.device(device)
    dtype = choose_dtype(config.dtype, device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    models = {"softmax": softmax, "t5": converted}
    rows = []
    for resolution in sorted(config.resolutions):
        sized = {
            name: cast_to(at_resolution(model, resolution, config.pixels_per_latent), device, torch.float32)
            for name, model in models.items()
        }
        for row in _measure(sized, resolution, config, dtype, compiled):
            rows.append(row)
            if on_row:
                on_row(row)
    return {
        "device": describe_device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "compile": compiled,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "batch": config.batch,
        "warmup": config.warmup,
        "repeats": config.repeats,
        "rows": rows,
        "break_even_tokens": break_even_tokens(rows, "ms"),
        "break_even_tokens_flops": break_even_tokens(rows, "gflops"),
        "checked": {
            "against": f"the same model in {', '.join(sorted({row['reference'] for row in rows}))}",
            "tolerance": TOLERANCES[dtype],
            "max_relative_error": max(row["relative_error"] for row in rows),
        },
    }


def count_flops(model: nn.Module, inputs: Inputs) -> int:
    """FLOPs of one forward pass on `inputs`, by torch's counter: matrix products and convolutions, 2 a multiply-add.

    Counted on the meta device with attention written as matrix products, so the count is the same on every device
    and version, whichever fused kernel would run (torch has not always counted each of them).
    """
    meta = {name: t.to("meta") for tensors in (model.named_parameters(), model.named_buffers()) for name, t in tensors}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output_of(lambda *args, **named: torch.func.functional_call(model, meta, args, named), placed(inputs, "meta"))
    return counter.get_total_flops()


def time_interleaved(
    calls: dict[str, Callable[[], Any]], *, warmup: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of every timed call, by name.

    Each round times every call once and the order turns round from one round to the next, so that a clock that
    drifts or a neighbour that wakes up meets all of them alike.
    """
    clock = _cuda_ms if device.type == "cuda" else _cpu_ms
    for _ in range(warmup):
        for call in calls.values():
            call()
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            runs[name].append(clock(calls[name]))
    return runs


def break_even_tokens(rows: list[dict[str, Any]], key: str = "ms") -> int | None:
    """The token count from which on "t5" costs less than "softmax" by `key` at every larger size measured.

    Interpolated between the two sizes around it (logarithm of the ratio against logarithm of tokens); the smallest
    size measured if t5 is ahead everywhere; None if it is not ahead at the largest. Nothing is extrapolated.
    """
    ratios = cost_ratios(rows, key)
    if not ratios or ratios[-1][1] >= 1:
        return None
    behind = [index for index, (_, ratio) in enumerate(ratios) if ratio >= 1]
    if not behind:
        return ratios[0][0]
    (left, high), (right, low) = ratios[behind[-1]], ratios[behind[-1] + 1]
    share = math.log(high) / (math.log(high) - math.log(low))
    return math.ceil(left * (right / left) ** share)


def cost_ratios(rows: list[dict[str, Any]], key: str = "ms") -> list[tuple[int, float]]:
    """(tokens, cost of t5 / cost of softmax), by growing token count."""
    cost = {(row["tokens"], row["model"]): row[key] for row in rows}
    return [
        (tokens, cost[tokens, "t5"] / cost[tokens, "softmax"]) for tokens in sorted({row["tokens"] for row in rows})
    ]


def break_even_sentence(result: dict[str, Any]) -> str:
    """What `benchmark` found about speed, in plain words."""
    ratios, found = cost_ratios(result["rows"]), result["break_even_tokens"]
    (least, _), (most, ratio) = ratios[0], ratios[-1]
    if found is None:
        return (
            f"No gain up to {most:,} tokens on this device: there the converted model takes {ratio:.2f} times as long "
            "as softmax."
        )
    ahead = f"at {most:,} tokens it is {1 / ratio:.2f} times as fast"
    if found == least:
        return f"The converted model is faster at every size measured, from {least:,} tokens on; {ahead}."
    return f"The converted model is faster from about {found:,} tokens on; {ahead}."


def describe_device(device: str | torch.device) -> str:
    """The name people know the device by, e.g. "NVIDIA H100 80GB HBM3" or "AMD EPYC 7763, 2 threads"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def _measure(
    models: dict[str, nn.Module], resolution: int, config: BenchmarkConfig, dtype: torch.dtype, compiled: bool
) -> list[dict[str, Any]]:
    """One row for each of `models`, which are float32 and stand on the device."""
    device = next(models["softmax"].parameters()).device
    size = {"pixels_per_latent": config.pixels_per_latent, "text_tokens": config.text_tokens}
    inputs = random_inputs(models["softmax"], resolution, config.batch, **size)
    gflops = {name: count_flops(model, inputs) / 1e9 for name, model in models.items()}
    inputs = placed(inputs, device, dtype)
    cast = {name: cast_to(copy.deepcopy(model), dtype) for name, model in models.items()}
    if compiled:
        torch._dynamo.reset()  # else the copies of earlier resolutions use up the recompile limit: silently eager
        runnable = {name: compile_model(model, inputs) for name, model in cast.items()}
    else:
        runnable = cast
    kinds = torch._dynamo.config.patch(recompile_limit=KINDS_OF_BLOCKS)
    with torch.inference_mode(), attention_choice(device), kinds:
        where = {name: f"{name} at {resolution} px" for name in models}
        errors = {name: check_output(runnable[name], models[name], inputs, where[name]) for name in models}
        calls = {name: functools.partial(output_of, model, inputs) for name, model in runnable.items()}
        runs = time_interleaved(calls, warmup=config.warmup, repeats=config.repeats, device=device)
        peaks = {name: peak_mib(calls[name], cast[name], device) for name in models}
    return [
        {
            "resolution": resolution,
            "tokens": num_tokens(model, inputs),
            "model": name,
            "batch": config.batch,
            "ms": statistics.median(runs[name]),
            "ms_runs": runs[name],
            "images_per_second": 1e3 * config.batch / statistics.median(runs[name]),
            "peak_mib": peaks[name],
            "gflops": gflops[name],
            "relative_error": errors[name],
            "reference": str(reference_dtype(models[name], inputs)).removeprefix("torch."),
        }
        for name, model in models.items()
    ]


def compile_model(model: nn.Module, inputs: Inputs) -> nn.Module:
    """torch.compile `model` for inputs of this size, after one pass as it is; the blocks of a denoiser one by one.

    Blocks of a denoiser are large and alike: one compilation serves all of a kind. The masks that neighborhood
    attention keeps from its first pass would otherwise be made anew in every compiled one.
    """
    with torch.inference_mode(False), torch.no_grad():  # kept tensors may be used in training later
        output_of(model, inputs)
    if not isinstance(inputs, dict):
        return torch.compile(model, dynamic=False)
    for block in model.transformer_blocks:
        block.compile(dynamic=False)
    return model


def attention_choice(device: torch.device) -> AbstractContextManager:
    """cuDNN's fused attention first on CUDA: PyTorch's own order would take the slower flash kernel on Hopper."""
    if device.type != "cuda":
        return nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def reference_dtype(model: nn.Module, inputs: Inputs) -> torch.dtype:
    """float64; float32 for a denoiser on so many tokens that float64 attention, with its N × N maps, has no room."""
    large = isinstance(inputs, dict) and num_tokens(model, inputs) > MOST_IN_FLOAT64
    return torch.float32 if large else torch.float64


def check_output(runnable: Callable[..., Any], model: nn.Module, inputs: Inputs, where: str) -> float:
    """Relative error of `runnable` on `inputs` against `model` in `reference_dtype`, on the first few images.

    Raises:
        T5Error: it is above the tolerance of the inputs' dtype, or the output is not finite or of another shape.
    """
    output, images, dtype = output_of(runnable, inputs), leading(inputs), reference_dtype(model, inputs)
    reference = output_of(cast_to(copy.deepcopy(model), dtype), placed(first(inputs, CHECKED_IMAGES), dtype)).double()
    if output.shape[0] != images.shape[0] or output.shape[1:] != reference.shape[1:]:
        raise T5Error(
            f"{where}: output shape {tuple(output.shape)}, expected {(images.shape[0], *reference.shape[1:])}; "
            "is this torch.compile's doing? try compile: false"
        )
    error = ((output[:CHECKED_IMAGES].double() - reference).norm() / reference.norm()).item()
    tolerance = TOLERANCES[images.dtype]
    if not (output.isfinite().all() and error <= tolerance):
        raise T5Error(
            f"{where}: the {images.dtype} output is {error:.2g} (relative) from the same model in {dtype}, expected "
            f"finite and at most {tolerance:g}; no speed is given for wrong results. Try dtype: float32"
        )
    return error


def _cpu_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(call: Callable[[], Any], model: nn.Module, device: torch.device) -> float | None:
    """Weights of `model` and the most that one pass allocates beside what lay there before."""
    if device.type != "cuda":
        return None  # the CPU allocator keeps no such account, and resident size mixes in everything else
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return (weights + torch.cuda.max_memory_allocated(device) - before) / 2**20
