"""What converting would gain on this device: measured blocks, predicted models, and the resolution where it pays.

A pass of a model takes the time of everything but its blocks (embedding, norms, head) plus that of each block, and all
blocks of a vision transformer are alike. So a few short models are timed: one without blocks and, for softmax and every
kind of new layer, one with the first few blocks; (time with blocks − time without) / blocks is the time of a block, and
whatever a pass costs once (starting it, the clock itself) falls out of the difference. Every layer map follows from
these few numbers; `verify` measures whole models against them.

All models get the same treatment (t5lib.benchmarks.timing), and every output is checked against float64.
"""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from t5lib.benchmarks.resolution_sweep import break_even_tokens
from t5lib.benchmarks.timing import Rules, TimingConfig, describe_device, time_models
from t5lib.conversion import convert
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize
from t5lib.families.timm_base import check_plain_vit
from t5lib.layers.config import SOFTMAX, TTTConfig
from t5lib.layers.layer_map import format_layers
from t5lib.utils.config import AtLeastOne, Positive, Several, one_of, settings
from t5lib.utils.errors import T5Error

KINDS = ("swiglu", "swiglu+nat5")
GAIN = 1.02  # a speed-up below this is within what two runs differ by
WITHOUT_BLOCKS = "no blocks"


@settings
class PlanConfig(TimingConfig):
    """What is measured, and (TimingConfig) how.

    Attributes:
        chain: blocks of the short models that are timed (fewer where the model has fewer).
        factors: the resolutions measured, as multiples of the one asked for.
    """

    chain: AtLeastOne = 4
    factors: Several[Positive] = (0.5, 1.0, 2.0)

    def __post_init__(self):
        if 1.0 not in self.factors:
            raise T5Error(f"factors {list(self.factors)}: expected positive numbers with 1.0, the size asked for")


@settings
class Timing:
    """Milliseconds of a forward pass's parts at one resolution.

    Attributes:
        resolution: side of the image in pixels.
        tokens: those that attention sees in one image.
        rest_ms: everything but the blocks.
        block_ms: one block, by kind; "softmax" among them.
        ms_runs: every timed pass of the short models behind these figures.
        relative_error: of each short model's output against float64, within the tolerance of
            t5lib.benchmarks.resolution_sweep.
    """

    resolution: int
    tokens: int
    rest_ms: float
    block_ms: dict[str, float]
    ms_runs: dict[str, list[float]]
    relative_error: dict[str, float]


@settings
class Plan:
    """What `plan` measured, and what follows from it. An assignment names each layer's kind: "softmax" or a new one.

    Attributes:
        depth: layers of the model.
        patch, prefix: side of a patch in pixels, and tokens that are no patch.
        timings: by growing resolution.
        resolution: the one asked for, side of the image in pixels.
    """

    device: str
    dtype: str
    torch: str
    compiled: bool
    graphs: bool
    config: PlanConfig
    depth: int
    patch: int
    prefix: int
    kinds: Several[str]
    resolution: int
    timings: Several[Timing]

    @property
    def timing(self) -> Timing:
        """At the resolution asked for."""
        return next(timing for timing in self.timings if timing.resolution == self.resolution)

    def milliseconds(self, assignment: Sequence[str], timing: Timing | None = None) -> float:
        """Predicted time of a forward pass of the whole model.

        Raises:
            T5Error: another number of layers, or a kind that was not measured.
        """
        if len(assignment) != self.depth:
            raise T5Error(f"the assignment names {len(assignment)} layers; this model has {self.depth}")
        for kind in assignment:
            one_of(kind, (SOFTMAX, *self.kinds), "layer")
        timing = timing or self.timing
        return timing.rest_ms + sum(timing.block_ms[kind] for kind in assignment)

    def speedup(self, assignment: Sequence[str], timing: Timing | None = None) -> float:
        """Predicted: how many times as fast as softmax in all layers."""
        return self.milliseconds(self.uniform(SOFTMAX), timing) / self.milliseconds(assignment, timing)

    def uniform(self, kind: str) -> list[str]:
        return [kind] * self.depth

    @property
    def best_kind(self) -> str:
        """The kind of new layer whose block is fastest at the resolution asked for."""
        return min(self.kinds, key=self.timing.block_ms.__getitem__)

    def block_costs(self) -> list[dict[str, float]]:
        """Milliseconds of each layer's block by kind, for t5lib.planning.layer_search; `rest_ms` is not in it."""
        return [dict(self.timing.block_ms) for _ in range(self.depth)]

    def block_budget(self, *, speedup: float | None = None, budget_ms: float | None = None) -> float:
        """Milliseconds left for the blocks when a pass may take `budget_ms`, or must be `speedup` times as fast.

        Raises:
            T5Error: not one of both, or faster than this model can get (says what is possible).
        """
        softmax = self.milliseconds(self.uniform(SOFTMAX))
        if speedup is not None and budget_ms is None:
            wanted = softmax / speedup
        elif budget_ms is not None and speedup is None:
            wanted = budget_ms
        else:
            raise T5Error("give one of speedup and budget_ms")
        fastest = self.timing.rest_ms + self.depth * min(self.timing.block_ms.values())
        if wanted < fastest:
            raise T5Error(
                f"{wanted:.4g} ms a pass ({softmax / wanted:.3f} times as fast as softmax) is out of reach: the "
                f"fastest layer map takes {fastest:.4g} ms ({softmax / fastest:.3f} times as fast); ask for no more"
            )
        return wanted - self.timing.rest_ms

    def break_even(self, kind: str) -> int | None:
        """Tokens from which on a model with `kind` in every layer is faster.

        As t5lib.benchmarks.resolution_sweep.break_even_tokens.
        """
        rows = [
            {"tokens": timing.tokens, "model": model, "ms": self.milliseconds(self.uniform(layer), timing)}
            for timing in self.timings
            for model, layer in (("softmax", SOFTMAX), ("t5", kind))
        ]
        return break_even_tokens(rows)

    def side(self, tokens: int) -> int:
        """The side in pixels of a square image with that many tokens."""
        return round(self.patch * math.sqrt(max(tokens - self.prefix, 1)))

    @property
    def unrest(self) -> float:
        """How much longer than its fastest a typical pass took, as a share; the worst of all short models."""
        every = [runs for timing in self.timings for runs in timing.ms_runs.values()]
        return max(statistics.median(runs) / min(runs) for runs in every) - 1

    def verdict(self) -> str:
        """Whether converting pays here, in plain words."""
        kind, tokens = self.best_kind, self.timing.tokens
        gain, size = self.speedup(self.uniform(kind)), f"{self.resolution} px ({tokens:,} tokens)"
        if gain < 1:
            start = (
                f"No gain at this size: with {kind} in every layer a pass at {size} takes {1 / gain:.2f} times as long."
            )
        elif gain < GAIN:
            start = f"No gain at this size: with {kind} in every layer a pass at {size} is {gain:.2f} times as fast."
        else:
            start = f"A gain at this size: with {kind} in every layer a pass at {size} is {gain:.2f} times as fast."
        return f"{start} {self._where_it_pays(kind)}"

    def _where_it_pays(self, kind: str) -> str:
        found, smallest, largest = self.break_even(kind), self.timings[0], self.timings[-1]
        gain = f"{self.speedup(self.uniform(kind), largest):.2f} times as fast at {largest.resolution:,} px"
        if found is None:
            return f"Up to {largest.resolution:,} px, the largest size measured, there is no break-even."
        if found == smallest.tokens:
            return f"It is ahead at every size measured, from {smallest.resolution:,} px on ({gain})."
        return f"It is ahead from about {self.side(found):,} px ({found:,} tokens) on ({gain})."

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        whole = {
            kind: {
                "ms": self.milliseconds(self.uniform(kind)),
                "speedup": self.speedup(self.uniform(kind)),
                "break_even_tokens": None if kind == SOFTMAX else self.break_even(kind),
            }
            for kind in (SOFTMAX, *self.kinds)
        }
        return asdict(self) | {"all_layers": whole, "unrest": self.unrest, "verdict": self.verdict()}


def plan(
    model: nn.Module,
    resolution: int,
    device: str | torch.device = "cpu",
    kinds: Sequence[str] = KINDS,
    config: PlanConfig | None = None,
    *,
    on_timing: Callable[[Timing], None] | None = None,
) -> Plan:
    """Measure this device, and predict the time of `model` with any kind in any layer.

    Args:
        model: a softmax model of timm that can be converted; not changed. Its weights do not matter for the time.
        resolution: side of the image in pixels.
        kinds: values of a layer map (TTTConfig.layers) other than "softmax".
        on_timing: called with each finished resolution, to show progress.

    Raises:
        T5Error: a model that is no plain ViT of timm, a resolution that is not a multiple of the patch size, an unknown
            kind, outputs that are wrong (t5lib.benchmarks.timing.check_output), or times too noisy to tell a block's.
    """
    config, device = config or PlanConfig(), torch.device(device)
    family = family_of(model)
    family.check_convertible(model)
    check_plain_vit(model)
    rules, layers = Rules.of(config, device), {kind: settings_of(kind) for kind in kinds}
    if not layers:
        raise T5Error("kinds is empty; expected values of a layer map, such as 'swiglu'")
    timings = []
    for side in _sides(model, resolution, layers, config):
        sized = family.at_resolution(model, ExampleSize(side)).to(device, torch.float32)
        timings.append(_time(sized, side, layers, config, rules))
        if on_timing:
            on_timing(timings[-1])
    return Plan(
        device=describe_device(device),
        dtype=str(rules.dtype).removeprefix("torch."),
        torch=torch.__version__,
        compiled=rules.compiled,
        graphs=rules.graphs,
        config=config,
        depth=len(model.blocks),
        patch=model.patch_embed.patch_size[0],
        prefix=model.num_prefix_tokens,
        kinds=tuple(layers),
        resolution=resolution,
        timings=tuple(timings),
    )


def verify(
    plan: Plan, model: nn.Module, assignments: Sequence[Sequence[str]], device: str | torch.device = "cpu"
) -> list[dict[str, Any]]:
    """Measure whole models and compare with what `plan` predicted.

    Args:
        model: the softmax model that was planned for.
        assignments: each is measured beside the others, in alternating rounds.

    Returns:
        A JSON-ready row each: layers (a layer map), predicted_ms, measured_ms, deviation (predicted / measured − 1),
        ms_runs, launched_ms (without CUDA graph; None where none is used) and relative_error (output against float64).

    Raises:
        T5Error: another number of layers, a kind that was not measured, or outputs that are wrong.
    """
    rules = Rules.of(plan.config, torch.device(device))
    size = ExampleSize(plan.resolution, plan.config.batch)
    family = family_of(model)
    sized = family.at_resolution(model, size).to(device, torch.float32)
    predicted = [plan.milliseconds(assignment) for assignment in assignments]
    models = {str(index): _assembled(sized, assignment) for index, assignment in enumerate(assignments)}
    where = f"at {plan.resolution} px"
    times = time_models(models, family.example_inputs(sized, size), plan.config, rules, where)
    return [
        {
            "layers": format_layers(list(assignment)),
            "predicted_ms": ms,
            "measured_ms": time.ms,
            "deviation": ms / time.ms - 1,
            "ms_runs": time.ms_runs,
            "launched_ms": time.launched_ms,
            "relative_error": time.relative_error,
        }
        for assignment, ms, time in zip(assignments, predicted, times.values(), strict=True)
    ]


def settings_of(kind: str) -> TTTConfig:
    """What a kind of new layers stands for. Raises T5Error for softmax, and for what is no kind."""
    found = TTTConfig().named(kind)
    if found is None:
        raise T5Error("kinds holds 'softmax', which is measured in any case; name new layers, such as 'swiglu'")
    return found


def _sides(model: nn.Module, resolution: int, kinds: dict[str, TTTConfig], config: PlanConfig) -> list[int]:
    """The resolutions to measure, multiples of the patch size whose grid holds every neighborhood window."""
    patch = model.patch_embed.patch_size[0]
    if resolution % patch or resolution < patch:
        nearest = max(1, round(resolution / patch)) * patch
        raise T5Error(f"resolution {resolution} is not a multiple of the patch size {patch}; the nearest is {nearest}")
    least = max([1, *(kind.window for kind in kinds.values() if kind.window)])
    if resolution // patch < least:
        raise T5Error(
            f"resolution {resolution} makes a grid of {resolution // patch} patches a side, and a neighborhood window "
            f"is {least}: plan for {least * patch} px or more, or for kinds without it"
        )
    grids = {round(resolution * factor / patch) for factor in config.factors if factor != 1}
    return sorted({resolution, *(patch * grid for grid in grids if grid >= least)})


def _time(model: nn.Module, side: int, kinds: dict[str, TTTConfig], config: PlanConfig, rules: Rules) -> Timing:
    """`model` is of this side, in float32, and on the device."""
    chain = min(config.chain, len(model.blocks))
    models = {WITHOUT_BLOCKS: _shortened(model, 0), SOFTMAX: _shortened(model, chain)}
    for kind, layer in kinds.items():
        models[kind] = convert(_shortened(model, chain), layer, inplace=True)
    family = family_of(model)
    inputs = family.example_inputs(model, ExampleSize(side, config.batch))
    times = time_models(models, inputs, config, rules, f"at {side} px")
    ms = {name: time.ms for name, time in times.items()}
    rest = ms.pop(WITHOUT_BLOCKS)
    block_ms = {kind: (whole - rest) / chain for kind, whole in ms.items()}
    if min(block_ms.values()) <= 0:
        raise T5Error(
            f"at {side} px a model of {chain} blocks took no longer than one without ({ms} ms against {rest:.4g}): the "
            "machine is too busy, or the blocks are too small to time; use a larger batch or more repeats"
        )
    return Timing(
        resolution=side,
        tokens=family.num_tokens(model, inputs),
        rest_ms=rest,
        block_ms=block_ms,
        ms_runs={name: time.ms_runs for name, time in times.items()},
        relative_error={name: time.relative_error for name, time in times.items()},
    )


def _shortened(model: nn.Module, blocks: int) -> nn.Module:
    """A copy with the first few blocks only."""
    every, model.blocks = model.blocks, nn.Sequential(*list(model.blocks)[:blocks])
    try:
        return copy.deepcopy(model)
    finally:
        model.blocks = every


def _assembled(model: nn.Module, assignment: Sequence[str]) -> nn.Module:
    """A copy of the softmax model with new layers (random weights) as `assignment` says."""
    if set(assignment) == {SOFTMAX}:
        return copy.deepcopy(model)
    return convert(model, TTTConfig(layers=format_layers(list(assignment))))
