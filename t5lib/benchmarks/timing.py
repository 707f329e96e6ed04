"""Several models timed side by side under one set of rules, each figure checked; on CUDA as CUDA graphs.

The rules are those of t5lib.benchmarks.resolution_sweep: on CUDA bfloat16, torch.compile and cuDNN's fused attention first, elsewhere
float32 as it is; rounds that alternate between the models. On CUDA each pass is also replayed as one CUDA graph (what
torch.compile's mode "reduce-overhead" does), because the kernels of a small model run shorter than Python takes to
launch them: without it the time of a model would not be the sum of its parts' times.
"""

import copy
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t5lib.benchmarks.resolution_sweep import (
    attention_choice,
    check_output,
    choose_dtype,
    compile_model,
    time_interleaved,
)
from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """How models are timed.

    Attributes:
        batch: images a forward pass.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        compile: torch.compile; None means on CUDA only.
        graphs: replay each pass as a CUDA graph; None means wherever models are compiled for CUDA.
        warmup, repeats: untimed and timed passes of each model; medians count.
    """

    batch: int = 1
    dtype: str = "auto"
    compile: bool | None = None
    graphs: bool | None = None
    warmup: int = 2
    repeats: int = 9

    def __post_init__(self):
        one_of(self.dtype, ("auto", "float32", "float16", "bfloat16"), "dtype")
        for name, least in (("batch", 1), ("warmup", 0), ("repeats", 1)):
            if getattr(self, name) < least:
                raise T5Error(f"{name} is {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True)
class Rules:
    """What TimingConfig comes to on this device."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    graphs: bool

    @classmethod
    def of(cls, config: TimingConfig, device: torch.device) -> "Rules":
        cuda = device.type == "cuda"
        compiled = cuda if config.compile is None else config.compile
        if config.graphs and not cuda:
            raise T5Error(f"graphs is on and the device is {device}; CUDA graphs need a CUDA device: leave graphs out")
        graphs = cuda and compiled if config.graphs is None else config.graphs
        return cls(device, choose_dtype(config.dtype, device), compiled, graphs)


@dataclass(frozen=True)
class Race:
    """What one of several models took.

    Attributes:
        ms_runs: every timed pass.
        launched_ms: the median without CUDA graph, each kernel launched by Python; None where no graph is used.
        relative_error: of the output, against float64.
    """

    ms_runs: list[float]
    launched_ms: float | None
    relative_error: float


def race(models: dict[str, nn.Module], side: int, config: TimingConfig, rules: Rules) -> dict[str, Race]:
    """Time float32 `models` on the device side by side, at square images of `side` pixels.

    Raises:
        T5Error: an output that is wrong in this dtype (t5lib.benchmarks.resolution_sweep.check_output): no speed for wrong results.
    """
    shape = (config.batch, next(iter(models.values())).patch_embed.proj.in_channels, side, side)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(rules.device, rules.dtype)
    clock = {"warmup": config.warmup, "repeats": config.repeats, "device": rules.device}
    with torch.inference_mode(), attention_choice(rules.device), _every_model_compiled(rules):
        launched = {name: _compiled(model, images, rules) for name, model in models.items()}
        for call in launched.values():
            call(images)  # compiles
        passes = {name: _replayed(call, images, name) for name, call in launched.items()} if rules.graphs else launched
        errors = {name: check_output(passes[name], models[name], images, f"{name} at {side} px") for name in models}
        runs = time_interleaved({name: _bound(call, images) for name, call in passes.items()}, **clock)
        plain = {}
        if rules.graphs:
            plain = time_interleaved({name: _bound(call, images) for name, call in launched.items()}, **clock)
    return {name: Race(runs[name], statistics.median(plain[name]) if plain else None, errors[name]) for name in models}


def _every_model_compiled(rules: Rules) -> AbstractContextManager:
    """All models are one class to the compiler: beyond its limit it would run the next ones as they are."""
    if not rules.compiled:
        return nullcontext()
    torch._dynamo.reset()
    return torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)


def _compiled(model: nn.Module, images: Tensor, rules: Rules) -> Callable[[Tensor], Tensor]:
    cast = copy.deepcopy(model).to(rules.dtype)
    return compile_model(cast, images) if rules.compiled else cast


def _bound(call: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    return lambda: call(images)


def _replayed(call: Callable[[Tensor], Tensor], images: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """`call` on these very `images`, recorded once and launched as a whole; the output is the same memory each time.

    Raises:
        T5Error: the device refuses to record it.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # recording wants everything that is set up at first use to be there
        for _ in range(3):
            call(images)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = call(images)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise T5Error(f"{name} cannot be recorded as a CUDA graph ({reason}); measure with graphs: false") from error

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return output

    return replay
