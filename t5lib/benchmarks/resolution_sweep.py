"""Softmax and converted model side by side: FLOPs, latency and memory against resolution, each figure checked.

Both models get the same treatment: same weights at every resolution, same dtype, same compilation, rounds that
alternate between them. The softmax side is PyTorch's fused attention (on CUDA cuDNN's first, then flash), the
strongest baseline at hand.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t5lib.benchmarks.timing import (
    TOLERANCES,
    DType,
    Rules,
    TimingConfig,
    cast_to,
    choose_dtype,
    describe_device,
    time_models,
)
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize, Inputs, placed
from t5lib.utils.config import BatchSize, Pixels, Repeats, Several, Tokens, settings
from t5lib.utils.errors import T5Error


@settings
class BenchmarkConfig:
    """What is measured.

    Attributes:
        resolutions: image sides in pixels, each a multiple of the patch size.
        batch: images a forward pass.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        warmup: untimed passes of each model at each resolution.
        repeats: timed passes of each model at each resolution; the median is reported, all are kept.
        compile: torch.compile both models; None means on CUDA only.
        pixels_per_latent: of a denoiser: pixels that one latent is wide; 1 where pixels are the latents.
        text_tokens: of a denoiser that takes text.
    """

    resolutions: Several[Pixels] = (98, 224, 392, 518)
    batch: BatchSize = 1
    dtype: DType = "auto"
    warmup: Annotated[int, Field(ge=0, le=10_000)] = 1
    repeats: Repeats = 5
    compile: bool | None = None
    pixels_per_latent: Pixels = 8
    text_tokens: Tokens = 333

    def __post_init__(self):
        if not self.resolutions:
            raise T5Error("resolutions is empty; expected at least one image side in pixels")
        if len(set(self.resolutions)) < len(self.resolutions):
            raise T5Error(f"resolutions is {list(self.resolutions)}; expected each once")

    def at(self, resolution: int) -> ExampleSize:
        return ExampleSize(resolution, self.batch, self.pixels_per_latent, self.text_tokens)


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
        softmax: the original; it is not changed.
        converted: its converted twin, with the same input (t5lib.convert); it is not changed either.
        on_row: called with each finished row, to show progress.

    Returns:
        JSON-ready: device, dtype, torch, compile, threads, batch, warmup, repeats; `rows`, one a resolution and
        model ("softmax" or "t5"), with resolution, tokens, batch, ms (median of ms_runs), images_per_second,
        peak_mib (weights and activations of one pass, None off CUDA), gflops (a pass of the whole batch; one
        multiply-add counts as 2, matrix products and convolutions only), relative_error and reference (the precision
        it is against); break_even_tokens and break_even_tokens_flops (see `break_even_tokens`); `checked`, what
        relative_error was measured against.

    Raises:
        T5Error: a resolution that is not a multiple of the patch size, or a model whose output in this dtype is not
            finite or is further than the tolerance from its own in `reference_dtype`: wrong results get no speed.
    """
    config, device = config or BenchmarkConfig(), torch.device(device)
    dtype = choose_dtype(config.dtype, device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    adapter, models, rows = family_of(softmax), {"softmax": softmax, "t5": converted}, []
    for resolution in sorted(config.resolutions):
        size = config.at(resolution)
        sized = {
            name: cast_to(adapter.at_resolution(model, size), device, torch.float32) for name, model in models.items()
        }
        for row in _measure(sized, adapter.example_inputs(sized["softmax"], size), size, config, compiled):
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
        torch.func.functional_call(model, meta, (), placed(inputs, "meta"))
    return counter.get_total_flops()


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


def _measure(
    models: dict[str, nn.Module], inputs: Inputs, size: ExampleSize, config: BenchmarkConfig, compiled: bool
) -> list[dict[str, Any]]:
    """One row for each of `models`, which are float32 and stand on the device."""
    device = next(models["softmax"].parameters()).device
    timing = TimingConfig(
        dtype=config.dtype, compile=compiled, graphs=False, warmup=config.warmup, repeats=config.repeats
    )
    gflops = {name: count_flops(model, inputs) / 1e9 for name, model in models.items()}
    times = time_models(models, inputs, timing, Rules.of(timing, device), f"at {size.resolution} px")
    return [
        {
            "resolution": size.resolution,
            "tokens": family_of(model).num_tokens(model, inputs),
            "model": name,
            "batch": size.batch,
            "ms": times[name].ms,
            "ms_runs": times[name].ms_runs,
            "images_per_second": 1e3 * size.batch / times[name].ms,
            "peak_mib": times[name].peak_mib,
            "gflops": gflops[name],
            "relative_error": times[name].relative_error,
            "reference": str(times[name].reference).removeprefix("torch."),
        }
        for name, model in models.items()
    ]
