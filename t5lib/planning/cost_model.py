"""What converting would gain on this device: measured blocks, predicted models, and the resolution where it pays.

A pass of a model takes the time of everything but its blocks (embedding, norms, head) plus that of each block, and all
blocks of a vision transformer are alike. So a few short models are timed: one without blocks and, for softmax and every
kind of new layer, one with the first few blocks; (time with blocks − time without) / blocks is the time of a block, and
whatever a pass costs once (starting it, the clock itself) falls out of the difference. Every layer map follows from
these few numbers; `verify` measures whole models against them.

Where models are compiled, the same short models also tell what a pass takes in the other modes that people use:
uncompiled, and compiled but with every kernel launched from Python.

All models get the same treatment (t5lib.benchmarks.timing), and every output is checked against float64.
"""

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from t5lib.benchmarks.resolution_sweep import break_even_tokens
from t5lib.benchmarks.timing import ModelTime, Rules, TimingConfig, describe_device, time_models
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
EAGER, COMPILED, GRAPHS = "eager", "compiled", "graphs"
MODES = {EAGER: "uncompiled", COMPILED: "compiled without CUDA graphs", GRAPHS: "compiled with CUDA graphs"}
TURNED_ON = {COMPILED: "model.compile()", GRAPHS: 'model.compile(mode="reduce-overhead")'}


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
        eager: at that resolution, uncompiled; None where `timings` are uncompiled, and in older plans.
        launched: at that resolution, compiled and launched from Python; None without graphs, and in older plans.
            In both, no block is taken to be faster than in a CUDA graph, where there is one.
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
    eager: Timing | None = None
    launched: Timing | None = None

    @property
    def mode(self) -> str:
        """That of `timings`, a key of MODES."""
        return GRAPHS if self.graphs else COMPILED if self.compiled else EAGER

    @property
    def modes(self) -> dict[str, Timing]:
        """At the resolution asked for, in every mode measured; the simplest mode first."""
        every = {EAGER: self.eager, COMPILED: self.launched, self.mode: self.timing}
        return {mode: timing for mode, timing in every.items() if timing}

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

    def advice(self) -> str:
        """How to run a converted model, and which kinds pay in some modes only; empty where one mode was measured."""
        modes = self.modes
        if len(modes) == 1:
            return ""
        ms = {
            (kind, mode): self.milliseconds(self.uniform(kind), timing)
            for mode, timing in modes.items()
            for kind in self.kinds
        }
        kind, fastest = min(ms, key=ms.__getitem__)
        mode = next(mode for mode in modes if ms[kind, mode] <= GAIN * ms[kind, fastest])  # the simplest one as fast
        said = [f"A converted model runs fastest {MODES[mode]}: {ms[kind, mode]:.4g} ms a pass with {kind}."]
        if mode in TURNED_ON:
            said.append(f"To turn this on, call {TURNED_ON[mode]}.")
        return " ".join([*said, *filter(None, map(self._where_it_pays_by_mode, self.kinds))])

    def _where_it_pays_by_mode(self, kind: str) -> str:
        """Empty where all modes agree."""
        pays = {mode: self.speedup(self.uniform(kind), timing) >= GAIN for mode, timing in self.modes.items()}
        if len(set(pays.values())) == 1:
            return ""
        where, elsewhere = ([MODES[mode] for mode in pays if pays[mode] == wanted] for wanted in (True, False))
        return f"{kind} pays when {' or '.join(where)}, but not when {' or '.join(elsewhere)}."

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        whole = {
            kind: figures | {"break_even_tokens": None if kind == SOFTMAX else self.break_even(kind)}
            for kind, figures in self._figures(self.timing).items()
        }
        modes = {mode: self._figures(timing) for mode, timing in self.modes.items()}
        said = {"verdict": self.verdict(), "advice": self.advice()}
        return asdict(self) | {"all_layers": whole, "modes": modes, "unrest": self.unrest} | said

    def _figures(self, timing: Timing) -> dict[str, dict[str, Any]]:
        """By kind, of a model with it in every layer."""
        uniform = {kind: self.uniform(kind) for kind in (SOFTMAX, *self.kinds)}
        return {
            kind: {"ms": self.milliseconds(layers, timing), "speedup": self.speedup(layers, timing)}
            for kind, layers in uniform.items()
        }


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
    timings: list[Timing] = []
    others: dict[str, Timing] = {}
    for side in _sides(model, resolution, layers, config):
        sized = family.at_resolution(model, ExampleSize(side)).to(device, torch.float32)
        timing, other_modes = _time(sized, side, layers, config, rules, every_mode=side == resolution)
        timings.append(timing)
        others |= other_modes
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
        **others,
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


def _time(
    model: nn.Module, side: int, kinds: dict[str, TTTConfig], config: PlanConfig, rules: Rules, *, every_mode: bool
) -> tuple[Timing, dict[str, Timing]]:
    """As `rules` say, and `Plan.eager` and `Plan.launched` where models are compiled and `every_mode` is wanted.

    Args:
        model: of this side, in float32, and on the device.
    """
    chain = min(config.chain, len(model.blocks))
    models = {WITHOUT_BLOCKS: _shortened(model, 0), SOFTMAX: _shortened(model, chain)}
    for kind, layer in kinds.items():
        models[kind] = convert(_shortened(model, chain), layer, inplace=True)
    family = family_of(model)
    inputs = family.example_inputs(model, ExampleSize(side, config.batch))
    size = {"resolution": side, "tokens": family.num_tokens(model, inputs)}
    times = time_models(models, inputs, config, rules, f"at {side} px")
    others = {}
    if every_mode and rules.compiled:
        plain = time_models(
            models, inputs, config, dataclasses.replace(rules, compiled=False), f"uncompiled at {side} px"
        )
        others["eager"] = _launched(plain, chain, size)
        if rules.graphs:
            others["launched"] = _launched(times, chain, size)
    return _timing(times, chain, size), others


def _launched(times: dict[str, ModelTime], chain: int, size: dict[str, int]) -> Timing:
    """Of passes launched from Python, in which no block is taken to be faster than in a CUDA graph.

    It seems faster where the model without blocks waits for Python, and four blocks keep the device busy meanwhile.
    """
    least, timing = _timing(times, chain, size).block_ms, _timing(times, chain, size, launched=True)
    return dataclasses.replace(timing, block_ms={kind: max(ms, least[kind]) for kind, ms in timing.block_ms.items()})


def _timing(times: dict[str, ModelTime], chain: int, size: dict[str, int], *, launched: bool = False) -> Timing:
    runs = {name: (time.launched_runs if launched else None) or time.ms_runs for name, time in times.items()}
    ms = {name: statistics.median(of_model) for name, of_model in runs.items()}
    rest = ms.pop(WITHOUT_BLOCKS)
    block_ms = {kind: (whole - rest) / chain for kind, whole in ms.items()}
    if min(block_ms.values()) <= 0:
        raise T5Error(
            f"at {size['resolution']} px a model of {chain} blocks took no longer than one without ({ms} ms against "
            f"{rest:.4g}): the machine is too busy, or the blocks are too small to time; use a larger batch or more "
            "repeats"
        )
    errors = {name: time.relative_error for name, time in times.items()}
    return Timing(**size, rest_ms=rest, block_ms=block_ms, ms_runs=runs, relative_error=errors)


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
