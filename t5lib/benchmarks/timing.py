"""Several models timed side by side under one set of rules, each figure checked; on CUDA as CUDA graphs too.

Every model gets the same treatment: the same dtype (on CUDA bfloat16, elsewhere float32), torch.compile on CUDA and
cuDNN's fused attention first, rounds that alternate between the models. On CUDA each pass is also replayed as one CUDA
graph (what torch.compile's mode "reduce-overhead" does), because the kernels of a small model run shorter than Python
takes to launch them: without it the time of a model would not be the sum of its parts' times.
"""

import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from t5kernels.tools.graphs import recorded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from t5lib.families import family_of
from t5lib.families.inputs import Inputs, count, first, placed
from t5lib.utils.config import AtLeastOne, WholeNumber, settings
from t5lib.utils.errors import T5Error

# Relative error allowed against the model's own float64 output: round-off that grows through all layers, no more.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
ALLOWED, MOST_ALLOWED = 2.0, 0.2  # times the error of plain PyTorch, and never more than this
CHECKED_IMAGES = 2
MOST_IN_FLOAT64 = 8192  # tokens
KINDS_OF_BLOCKS = 256  # that torch.compile may meet in one process

DType = Literal["auto", "float32", "float16", "bfloat16"]


@settings
class TimingConfig:
    """How models are timed.

    Attributes:
        batch: images a forward pass.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        compile: torch.compile; None means on CUDA only.
        whole: compile each model as a whole, as `torch.compile(pipe.transformer)` does, even if it is usually compiled
            block by block to save time.
        graphs: replay each pass as a CUDA graph; None means wherever models are compiled for CUDA.
        warmup, repeats: untimed and timed passes of each model; medians count.
    """

    batch: AtLeastOne = 1
    dtype: DType = "auto"
    compile: bool | None = None
    whole: bool = False
    graphs: bool | None = None
    warmup: WholeNumber = 2
    repeats: AtLeastOne = 9


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
class ModelTime:
    """What one of several models took.

    Attributes:
        ms_runs: every timed pass.
        launched_ms: the median without CUDA graph, each kernel launched by Python; None where no graph is used.
        relative_error: of the output, against `reference`.
        peak_mib: weights and the activations of one pass; None off CUDA.
    """

    ms_runs: list[float]
    launched_runs: list[float] | None
    relative_error: float
    reference: torch.dtype
    peak_mib: float | None

    @property
    def ms(self) -> float:
        return statistics.median(self.ms_runs)

    @property
    def launched_ms(self) -> float | None:
        return statistics.median(self.launched_runs) if self.launched_runs else None


def time_models(
    models: dict[str, nn.Module],
    inputs: Inputs,
    config: TimingConfig,
    rules: Rules,
    where: str = "",
    yardsticks: Mapping[str, str] | None = None,
) -> dict[str, ModelTime]:
    """Time models of one family, in float32 on the device, side by side on the same inputs.

    Args:
        inputs: float32, on any device.
        where: what errors say of the inputs, such as "at 518 px".
        yardsticks: by model the name of one of plain PyTorch, perhaps itself. Its error may be ALLOWED times that one's
            (uncompiled), if that is more than TOLERANCES, because random weights magnify round-off in some models.

    Raises:
        T5Error: an output that is wrong in this dtype (`check_output`): no speed for wrong results; or the device
            refuses to record a CUDA graph.
    """
    inputs = placed(inputs, rules.device, rules.dtype)
    clock: dict[str, Any] = {"warmup": config.warmup, "repeats": config.repeats, "device": rules.device}
    with torch.inference_mode(), attention_choice(rules.device), every_model_compiled(rules):
        cast = {name: cast_to(copy.deepcopy(model), rules.dtype) for name, model in models.items()}
        if rules.compiled:
            cast = {name: compile_model(model, inputs, whole=config.whole) for name, model in cast.items()}
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(family_of(model).call, model, inputs) for name, model in cast.items()
        }
        for call in calls.values():
            call()  # compiles
        passes = {name: _recorded(call, name) for name, call in calls.items()} if rules.graphs else calls
        yardsticks = yardsticks or {}
        plain = {
            name: allowed_error(models[name], inputs, reference_output(models[name], inputs), rules.dtype)
            for name in dict.fromkeys(yardsticks.values())
        }
        allowed = {name: plain[own] for name, own in yardsticks.items()}
        errors = {
            name: check_output(passes[name](), models[name], inputs, f"{name} {where}", allowed.get(name))
            for name in models
        }
        runs = time_interleaved(passes, **clock)
        launched = time_interleaved(calls, **clock) if rules.graphs else dict.fromkeys(calls)
        peaks = {name: peak_mib(call, cast[name], rules.device) for name, call in calls.items()}
    return {
        name: ModelTime(runs[name], launched[name], errors[name], reference_dtype(model, inputs), peaks[name])
        for name, model in models.items()
    }


def _recorded(call: Callable[[], Tensor], name: str) -> Callable[[], Tensor]:
    try:
        return recorded(call)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise T5Error(f"{name} cannot be recorded as a CUDA graph ({reason}); measure with graphs: false") from error


def every_model_compiled(rules: Rules) -> AbstractContextManager:
    """All models are one class to the compiler: beyond its limit it would run the next ones as they are."""
    if not rules.compiled:
        return nullcontext()
    torch._dynamo.reset()
    return torch._dynamo.config.patch(recompile_limit=KINDS_OF_BLOCKS, fail_on_recompile_limit_hit=True)


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


def describe_device(device: str | torch.device) -> str:
    """The name people know the device by, e.g. "NVIDIA H100 80GB HBM3" or "AMD EPYC 7763, 2 threads"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def compile_model(model: nn.Module, inputs: Inputs, whole: bool = False) -> nn.Module:
    """Compile `model` in place for inputs of this size, after one uncompiled pass: whole, or as its family prefers.

    A block has to be one graph, for parts that run uncompiled would be timed without a word.

    The masks that neighborhood attention keeps from its first pass would otherwise be made anew in every compiled one.
    """
    adapter = family_of(model)
    with torch.inference_mode(False), torch.no_grad():  # kept tensors may be used in training later
        adapter.call(model, inputs)
    if adapter.compiled_by_block and not whole:
        for block in adapter.blocks(model):
            block.compile(dynamic=False, fullgraph=True)
    else:
        model.compile(dynamic=False)
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
    """float64, or float32 for so many tokens that the N × N maps of float64 attention do not fit."""
    return torch.float32 if family_of(model).num_tokens(model, inputs) > MOST_IN_FLOAT64 else torch.float64


def run_plainly(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The output of `model` in `dtype` on the first few images, not compiled."""
    return family_of(model).call(cast_to(copy.deepcopy(model), dtype), placed(first(inputs, CHECKED_IMAGES), dtype))


def reference_output(model: nn.Module, inputs: Inputs) -> Tensor:
    """What `model` makes of the first few images in `reference_dtype`, in float64."""
    adapter, dtype = family_of(model), reference_dtype(model, inputs)
    exact = cast_to(copy.deepcopy(model), dtype)
    return adapter.call(exact, placed(first(inputs, CHECKED_IMAGES), dtype)).double()


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Of the first few images, against their `reference_output`.

    Raises:
        T5Error: the output has another shape.
    """
    if output.shape[1:] != reference.shape[1:]:
        raise T5Error(
            f"the output's shape is {tuple(output.shape)}; expected {(len(output), *reference.shape[1:])}; "
            "is this torch.compile's doing? try compile: false"
        )
    return ((output[:CHECKED_IMAGES].double() - reference).norm() / reference.norm()).item()


def allowed_error(model: nn.Module, inputs: Inputs, reference: Tensor, dtype: torch.dtype) -> float:
    """The tolerance of `dtype`, or what `model`, of plain PyTorch and not compiled, makes necessary."""
    plain = relative_error(run_plainly(model, inputs, dtype), reference)
    return max(TOLERANCES[dtype], min(ALLOWED * plain, MOST_ALLOWED))


def check_output(
    output: Tensor,
    model: nn.Module,
    inputs: Inputs,
    where: str,
    tolerance: float | None = None,
    reference: Tensor | None = None,
) -> float:
    """The `relative_error` of `output` on `inputs`, against `model` in higher precision, after a check.

    Args:
        tolerance: the largest error; None for that of the output's dtype.
        reference: `reference_output`, where it is known already.

    Raises:
        T5Error: the error is above the tolerance, or the output is not finite or has another shape.
    """
    dtype = reference_dtype(model, inputs)
    if len(output) != count(inputs):
        raise T5Error(f"{where}: {len(output)} outputs for {count(inputs)} images; try compile: false")
    error = relative_error(output, reference_output(model, inputs) if reference is None else reference)
    tolerance = TOLERANCES[output.dtype] if tolerance is None else tolerance
    if not (output.isfinite().all() and error <= tolerance):
        raise T5Error(
            f"{where}: the {output.dtype} output is {error:.2g} (relative) from the same model in {dtype}, expected "
            f"finite and at most {tolerance:.2g}; no speed is reported for wrong results. Try dtype: float32"
        )
    return error


def cast_to(model: nn.Module, *where: torch.device | torch.dtype) -> nn.Module:
    """`model` itself, moved and in another precision; diffusers' own `to` would warn of every cast."""
    for each in where:
        nn.Module.to(model, each)
    return model


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
