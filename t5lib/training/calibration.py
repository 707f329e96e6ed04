"""Attention transfer: fit every new layer to the softmax layer it replaces, without labels, before any fine-tune.

The softmax model (teacher) runs on images, or on noised latents; each of its attentions gets an input and gives an
output, and the new layer of the same place learns to map one to the other. The layers do not see each other, so one
pass of the teacher serves them all, and since layers of one kind differ only in their heads, they are fitted as one
mixer with L·H heads (t5lib.training.layer_groups).

Shapes: B images, L layers, H heads, N tokens, D head width, C channels.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t5lib.conversion import ttt_layers
from t5lib.data.batches import Batches, Inputs, images_of, open_batches, run_on, seeded
from t5lib.families import family_of
from t5lib.layers.attention import TTTLayer
from t5lib.training.layer_groups import Example, Kind, Seen
from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error
from t5lib.utils.progress import progress

if TYPE_CHECKING:
    from t5lib.training.objectives import Objective

Log = Callable[[dict[str, float], int], None]
LOG_EVERY = 10
CALIBRATION = 2  # what tells the noise of a calibration from others with the same seed


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How the new layers are fitted.

    Attributes:
        steps: optimizer steps; 0 skips calibration.
        batch_size: images a step.
        lr: peak learning rate of the new weights (Adam); linear warm-up over `warmup` steps, then cosine to 0.
        lr_inherited: peak learning rate of the q, k and v projections and q and k norms, which are fitted along; 0
            keeps them as they are, at the price of a larger error (docs/results).
        pool: batches of teacher activations held at once; steps draw their images from this pool. What one image
            takes is about 2·L·N·C numbers: half a gigabyte for the paper's layers of SD3.5-Medium at 1024 px.
        reuse: how often each image of a pool is used before the pool is replaced.
        checkpoint_every: steps between checkpoints (they fall on the end of a pool).
        objective: "output" (squared error of the layer's output over its variance), or "attention" (cross-entropy to
            the softmax map, as Hedgehog does, arXiv 2402.04347; for mixers that have a map, at quadratic cost).
        compile: torch.compile the fitting step (worth it on CUDA).
        seed: the order in which images are drawn from a pool, and the noise of latents.
    """

    steps: int = 5000
    batch_size: int = 64
    lr: float = 1e-2
    lr_inherited: float = 1e-3
    warmup: int = 50
    pool: int = 4
    reuse: int = 2
    checkpoint_every: int = 500
    objective: str = "output"
    compile: bool = False
    seed: int = 0

    def __post_init__(self):
        one_of(self.objective, ("output", "attention"), "calibrate: objective")
        for name in ("batch_size", "pool", "reuse", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise T5Error(f"calibrate: {name} is {getattr(self, name)}; expected 1 or more")
        for name in ("steps", "warmup", "lr_inherited"):
            if getattr(self, name) < 0:
                raise T5Error(f"calibrate: {name} is {getattr(self, name)}; expected 0 or more")
        if self.lr <= 0:
            raise T5Error(f"calibrate: lr is {self.lr}; expected a positive number, such as 1.0e-2")


@dataclass(kw_only=True)
class CalibrationReport:
    """Error of each layer and the cost.

    The error is the squared error over the target's variance, on the first batch, which the fit leaves out (a loader
    that repeats its images gives them again later).
    """

    error_before: dict[str, float]
    error_after: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0


def calibrate(
    model: nn.Module,
    *,
    teacher: nn.Module,
    batches: Batches,
    config: CalibrateConfig | None = None,
    objective: "Objective | None" = None,
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> CalibrationReport:
    """Fit the new layers of `model`, in place, to the attentions of `teacher`.

    Args:
        model: a converted model (t5lib.convert).
        teacher: the softmax model it was converted from, on the same device.
        batches: images (B, 3, H, W), or tuples that begin with them (labels are not used); for a denoiser latents and
            conditions, as t5lib.training.objectives says. See t5lib.data.batches. Sizes may change between batches.
        config: the recipe.
        objective: of a denoiser: noises the latents, at levels drawn as in training.
        resume_dir: where partial work is kept; a second call with the same folder continues from there.
        log: called with {"loss": …, "lr": …} and the step.

    Raises:
        T5Error: the models do not match, or the loss is not finite.
    """
    config = config or CalibrateConfig()
    device = next(teacher.parameters()).device
    inputs_of = functools.partial(_inputs, objective=objective, seed=config.seed, device=device)
    source = open_batches(batches, 0)
    probe = inputs_of(next(source), 0)  # measured on, left out of the fit
    fit = _Fit(model, teacher, config, probe)
    report = CalibrationReport(error_before=fit.error_before, steps=config.steps)
    state = fit.restore(resume_dir)
    if state["step"]:
        source = open_batches(batches, state["batches"])
    try:
        with progress("calibrate", config.steps, state["step"]) as bar:
            while state["step"] < config.steps:
                begun, first = time.monotonic(), state["step"]
                taken = [inputs_of(next(source), state["batches"] + index) for index in range(config.pool)]
                state["batches"] += config.pool
                for loss in fit.steps(taken, first):
                    state["step"] += 1
                    _tell(loss, fit, state["step"], log, bar)
                state["seconds"] += time.monotonic() - begun
                if resume_dir and state["step"] // config.checkpoint_every > first // config.checkpoint_every:
                    fit.checkpoint(resume_dir, state)
    finally:
        fit.write_back()  # also when interrupted: a model half of whose layer was fitted would be of no use
    report.seconds, report.error_after = state["seconds"], fit.errors(fit.see(probe))
    return report


class _Fit:
    """The new layers of a model, those of one kind as one mixer, their optimizer, and the teacher they learn from."""

    def __init__(self, model: nn.Module, teacher: nn.Module, config: CalibrateConfig, probe: Inputs):
        self.config, self.layers, self.teacher = config, ttt_layers(model), teacher.eval()
        if not self.layers:
            raise T5Error("this model has no new layer to calibrate; convert it first (t5lib.convert)")
        self.family = family_of(model)
        self.sources = {name: self._source(name, layer) for name, layer in self.layers.items()}
        self.device = next(teacher.parameters()).device
        self.grid = next(iter(self.layers.values())).grid
        seen = self.see(probe)
        self.kinds = self._kinds(seen)
        groups = [{"params": [p for kind in self.kinds for p in kind.mixer.parameters()], "peak": config.lr}]
        if config.lr_inherited:
            groups.append({"params": list(self._inherited()), "peak": config.lr_inherited})
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise T5Error(
                "these layers have no new weights, so with lr_inherited 0 there is nothing to fit; set "
                "calibrate.lr_inherited, or skip calibration (steps: 0)"
            )
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, fused=self.device.type == "cuda")
        self.error_before = self.errors(seen)

    def autocast(self) -> torch.autocast:
        """bf16 on CUDA, where the fit is bound by memory; full precision on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def see(self, inputs: Inputs) -> Seen:
        """Run the teacher; what its attentions got and gave."""
        seen = Seen()
        hooks = [self.family.follow_inputs(self.teacher, self.grid)]
        for name, source in self.sources.items():
            hooks += self.family.watch(source, seen.inputs, seen.outputs, name)
        try:
            with self.autocast():
                run_on(self.teacher, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    @torch.no_grad()
    def examples(self, seen: Seen) -> list[Example]:
        """For each kind the layers' inputs and what they shall give."""
        with self.autocast():
            return [kind.examples(seen) for kind in self.kinds]

    def steps(self, taken: list[Inputs], first: int) -> Iterator[Tensor]:
        """Fit to some batches, those of one size together; what `step` returns, from step number `first` on."""
        number = first
        for inputs in _joined_by_size(taken):
            if number == self.config.steps:
                return
            pool = self.examples(self.see(inputs))
            for chosen in _draws(len(pool[0][0]), self.config, number):
                yield self.step([tuple(part[chosen] for part in parts) for parts in pool], number)
                number += 1
                if number == self.config.steps:
                    break

    def step(self, batch: list[Example], step: int) -> Tensor:
        """One optimizer step; returns the loss of each layer (L,), in the order of `names`."""
        warm = min(1.0, (step + 1) / max(self.config.warmup, 1))
        factor = warm * 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        with self.autocast():
            losses = torch.cat([kind.loss(*part) for kind, part in zip(self.kinds, batch, strict=True)])
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses.detach()

    @property
    def names(self) -> list[str]:
        """The layers, kind by kind."""
        return [name for kind in self.kinds for name in kind.layers]

    @torch.no_grad()
    def errors(self, seen: Seen) -> dict[str, float]:
        """Squared error over variance of every layer, whatever the objective."""
        with self.autocast():
            parts = [kind.error(*part) for kind, part in zip(self.kinds, self.examples(seen), strict=True)]
        found = dict(zip(self.names, torch.cat(parts).tolist(), strict=True))
        return {name: found[name] for name in self.layers}

    def write_back(self) -> None:
        for kind in self.kinds:
            kind.copy(to_layers=True)

    def checkpoint(self, folder: Path, state: dict[str, float]) -> None:
        content = {"state": state, "optimizer": self.optimizer.state_dict()}
        content["mixers"] = [kind.mixer.state_dict() for kind in self.kinds]
        content["inherited"] = [p.detach() for p in self._inherited()]
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / "calibrate.tmp")
        os.replace(folder / "calibrate.tmp", folder / "calibrate.pt")

    def restore(self, folder: Path | None) -> dict[str, float]:
        """Continue from a checkpoint if there is one. Counts: steps done, batches read (the probe is one), seconds."""
        if folder is None or not (folder / "calibrate.pt").exists():
            return {"step": 0, "batches": 1, "seconds": 0.0}
        content = torch.load(folder / "calibrate.pt", map_location=self.device, weights_only=True)
        for kind, weights in zip(self.kinds, content["mixers"], strict=True):
            kind.mixer.load_state_dict(weights)
        self.optimizer.load_state_dict(content["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(self._inherited(), content["inherited"], strict=True):
                parameter.copy_(value)
        return content["state"]

    def _inherited(self) -> Iterator[nn.Parameter]:
        if self.config.lr_inherited:
            for layer in self.layers.values():
                for part in self.family.projections(layer):
                    yield from part.parameters()

    def _kinds(self, seen: Seen) -> list[Kind]:
        kinds: dict[tuple, dict[str, TTTLayer]] = {}
        for name, layer in self.layers.items():
            kinds.setdefault(seen.kind_of(name, layer), {})[name] = layer
        parts = [len(seen.inputs[next(iter(layers))]) for layers in kinds.values()]
        return [
            Kind(self.family, layers, self.sources, count, self.config, self.device)
            for layers, count in zip(kinds.values(), parts, strict=True)
        ]

    def _source(self, name: str, layer: TTTLayer) -> nn.Module:
        """The attention that `layer` learns from."""
        try:
            source = self.teacher.get_submodule(name)
        except AttributeError:
            source = None
        if type(source) is not type(self.family.softmax_attention(layer)):
            found = "nothing" if source is None else f"a {type(source).__name__}"
            raise T5Error(f"the teacher has {found} at {name}; pass the softmax model that was converted")
        theirs, ours = self._sizes(source), self._sizes(layer)
        if theirs != ours:
            raise T5Error(
                f"{name} of the teacher has (heads, width, channels) {theirs}, of the model {ours}; "
                "pass the softmax model that was converted"
            )
        return source

    @torch.no_grad()
    def _sizes(self, attention: nn.Module) -> tuple[int, int, int]:
        """Heads, their width, and channels of the input."""
        first = self.family.projections(attention)[0]
        q = self.family.project(attention, (first.weight.new_zeros(1, 1, first.in_features),))[0]
        return q.shape[1], q.shape[3], first.in_features


def _inputs(batch: Any, number: int, *, objective: "Objective | None", seed: int, device: torch.device) -> Inputs:
    """What the teacher is called with, on the device."""
    if objective is None:
        return images_of(batch).to(device, non_blocking=True)
    return objective.noised(batch, seeded(seed, CALIBRATION, number)).to(device).inputs


def _joined_by_size(taken: list[Inputs]) -> list[Inputs]:
    """Batches whose images or latents have one size as one batch each."""
    sizes: dict[tuple[int, ...], list[Inputs]] = {}
    for inputs in taken:
        image = inputs["hidden_states"] if isinstance(inputs, dict) else inputs
        sizes.setdefault(tuple(image.shape[1:]), []).append(inputs)
    return [_joined(alike) for alike in sizes.values()]


def _joined(alike: list[Inputs]) -> Inputs:
    if isinstance(alike[0], dict):
        return {name: torch.cat([inputs[name] for inputs in alike]) for name in alike[0]}
    return torch.cat(alike)


def _draws(images: int, config: CalibrateConfig, first: int) -> Iterator[Tensor]:
    """Indices into a pool of `images`, `reuse` times through it in fresh random order."""
    generator = torch.Generator().manual_seed(config.seed + first)
    for _ in range(config.reuse):
        yield from torch.randperm(images, generator=generator).split(config.batch_size)


def _tell(errors: Tensor, fit: _Fit, step: int, log: Log | None, bar) -> None:
    """Show and log now and then (reading a number waits for the device), and stop at the first loss not finite."""
    if step % LOG_EVERY and step != fit.config.steps:
        return
    if not errors.isfinite().all():
        broken = [n for n, ok in zip(fit.names, errors.isfinite().tolist(), strict=True) if not ok]
        raise T5Error(
            f"calibration broke at step {step}: the error of {', '.join(broken)} is not finite; "
            f"lower calibrate.lr ({fit.config.lr}), or keep key_norm 'instance' (others can diverge)"
        )
    values = {"loss": errors.mean().item(), "lr": fit.optimizer.param_groups[0]["lr"]}
    bar.advance(step, loss=values["loss"])
    if log:
        log(values, step)
