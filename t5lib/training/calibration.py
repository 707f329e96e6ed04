"""Attention transfer: fit every new layer to the softmax layer it replaces, without labels, before any fine-tune.

The softmax model (teacher) runs on images, or on noised latents; each of its attentions gets an input and gives an
output, and the new layer of the same place learns to map one to the other. The layers do not see each other, so one
pass of the teacher serves them all, and since layers of one kind differ only in their heads, they are fitted as one
mixer with L·H heads (t5lib.training.layer_groups).

Shapes: B images, L layers, H heads, N tokens, D head width, C channels.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.conversion import ttt_layers
from t5lib.data.batches import Batches, open_batches
from t5lib.data.sampler import shuffled
from t5lib.families import family_of
from t5lib.families.base import Adapter, AttentionCall
from t5lib.families.inputs import Inputs, check_finite, count, joined_by_size, placed
from t5lib.layers.attention import TTTLayer
from t5lib.layers.layer_map import AUTO
from t5lib.training import checkpoints
from t5lib.training.layer_groups import TOGETHER, CalibrateConfig, Example, LayerGroup, Places, Seen, check_fit
from t5lib.training.loop import Done, Log, Work, cosine, run_steps, warmed_up
from t5lib.training.pair import check_pair, dtypes
from t5lib.training.recipe import many_kinds_compiled, to_compile
from t5lib.training.softmax_layers import SoftmaxChoice, put_softmax_back
from t5lib.utils import processes
from t5lib.utils.config import checked
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating
from t5lib.utils.processes import WHOLE
from t5lib.utils.seeds import own_random_states
from t5lib.utils.weights import digest

LOG_EVERY = 10
CHOICE_BATCHES = 4
STATE = "calibrate.pt"


@dataclass(kw_only=True)
class CalibrationReport:
    """Error of each layer and the cost.

    The error is the squared error over the target's variance, on the first batch, which the fit leaves out (a loader
    that repeats its images gives them again later). `softmax` is there where the config's layers are "auto": what was
    given back to softmax, and what every layer would have brought.
    """

    error_before: dict[str, float]
    error_after: dict[str, float] = field(default_factory=dict)
    softmax: SoftmaxChoice | None = None
    steps: int = 0
    seconds: float = 0.0


@own_random_states()
@torch.enable_grad()
def calibrate(
    model: nn.Module,
    *,
    teacher: nn.Module,
    batches: Batches,
    config: CalibrateConfig | None = None,
    resume_dir: Path | str | None = None,
    log: Log | None = None,
) -> CalibrationReport:
    """Fit the new layers of `model`, in place, to the attentions of `teacher`.

    Where TTTConfig.layers is "auto", those that harm the whole model most are then given back to softmax
    (t5lib.training.softmax_layers), measured on the first CHOICE_BATCHES batches.

    Args:
        model: a converted model (t5lib.convert).
        teacher: the softmax model it was converted from, on the same device.
        batches: what the models are called with (labels are not used): images (B, 3, H, W), or tuples that begin with
            them; keyword arguments of a denoiser (t5lib.training.objectives.noised_inputs makes them of latents). See
            t5lib.data.batches. Sizes may change between batches. Several processes pass the same.
        config: the recipe.
        resume_dir: where partial work is kept; a second call with the same folder continues from there.
        log: called in the main process with {"loss": …, "lr": …} and the step.

    Raises:
        T5Error: the models do not match, the loss is not finite, batches that the processes cannot share, checkpoints
            made by another recipe or code, or too little room for them.
    """
    config, resume_dir = checked(config, CalibrateConfig), checkpoints.opened(resume_dir)
    check_pair(model, teacher)
    _check_places(model, teacher)
    inputs_of = functools.partial(_inputs, family_of(teacher), teacher)
    with evaluating(teacher):
        source = open_batches(batches, 0)
        probe = inputs_of(next(source))  # measured on, left out of the fit
        fit = _Fit(model, teacher, config, probe)
        report = CalibrationReport(error_before=fit.error_before, steps=config.steps)
        resumed = resume_dir is not None and fit.restore(resume_dir)
        if (resumed or fit.part != WHOLE) and not fit.over(config.steps):
            source = open_batches(batches, fit.batches, fit.part)
        fit.source = map(inputs_of, source)
        try:
            with many_kinds_compiled() if fit.compiled else nullcontext():
                run_steps(
                    fit,
                    title="calibrate",
                    total=config.steps,
                    resume_dir=resume_dir if config.checkpoints_kept else None,
                    every=config.checkpoint_every,
                    log=log if processes.state().is_main_process else None,
                )
        finally:
            fit.write_back()  # also when interrupted: a model half of whose layer was fitted would be of no use
        report.seconds, report.error_after = fit.done.seconds, fit.errors(fit.see(probe))
        if model.t5_config.layers == AUTO:
            seen = map(inputs_of, islice(open_batches(batches, 0), CHOICE_BATCHES))
            report.softmax = put_softmax_back(model, teacher, list(seen), model.t5_config.softmax_layers, fit.autocast)
    return report


class _Fit(Work):
    """The new layers of a model, those of one kind as one mixer, their optimizer, and the teacher they learn from."""

    source: Iterator[Inputs]

    def __init__(self, model: nn.Module, teacher: nn.Module, config: CalibrateConfig, probe: Inputs):
        self.config, self.layers, self.teacher = config, ttt_layers(model), teacher
        self.family, self.part = family_of(model), processes.rows()
        self.part.of(config.batch_size, "calibrate: batch_size")
        self.sources = {name: self._source(name, layer) for name, layer in self.layers.items()}
        self.device = next(teacher.parameters()).device
        self.compiled = to_compile(config.compile, self.device, config.steps)
        seen = self.see(probe)
        check_fit(config, [layer.mixer for layer in self.layers.values()])
        self.groups = self._groups(seen)
        new = [parameter for group in self.groups for parameter in group.mixer.parameters()]
        parameters: list[dict[str, Any]] = [{"params": new, "peak": config.lr}]
        if config.lr_inherited:
            parameters.append({"params": list(self._inherited()), "peak": config.lr_inherited})
        parameters = [group for group in parameters if group["params"]]
        self.parameters = [parameter for group in parameters for parameter in group["params"]]
        processes.alike(self.parameters)
        self.optimizer = torch.optim.Adam(parameters, lr=config.lr, fused=self.device.type == "cuda")
        self.error_before = self.errors(seen)
        self.done, self.drawn = Done(), self._draws()
        self.made_by = checkpoints.maker(model, config, teacher=digest(teacher))
        self.batches, self.first = 1, 0  # where the present pool begins (after the probe), and with which step

    def autocast(self) -> torch.autocast:
        """bf16 on CUDA, where the fit is bound by memory; full precision on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def see(self, inputs: Inputs) -> Seen:
        """Run the teacher; what its attentions got and gave."""
        seen = Seen(self.family.grid(self.teacher, inputs))
        hooks = []
        for name, source in self.sources.items():
            hooks += self.family.watch(source, seen.calls, seen.outputs, name)
        try:
            with self.autocast():
                self.family.call(self.teacher, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    @torch.no_grad()
    def examples(self, seen: Seen) -> list[Example]:
        """For each group the layers' inputs and what they shall give."""
        with self.autocast():
            return [group.examples(seen) for group in self.groups]

    def step(self) -> dict[str, float]:
        """One optimizer step; the mean loss comes only now and then, since reading a number waits for the device."""
        batch = next(self.drawn)
        step, steps = self.done.step, self.config.steps
        factor = warmed_up(step, self.config.warmup) * cosine(step / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        parts = [self._learn(group, *each) for group, each in zip(self.groups, batch, strict=True)]
        losses = torch.cat(parts)
        processes.average([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if (step + 1) % LOG_EVERY and step + 1 != steps:
            return {}
        processes.average([losses])
        self._check_finite(losses, step + 1)
        return {"loss": losses.mean().item(), "lr": self.optimizer.param_groups[0]["lr"]}

    def _learn(self, group: LayerGroup, places: Places, example: Example) -> Tensor:
        """Make the gradients of a group, whose activations are then free for the next; returns its losses, (L,)."""
        variances = group.variances(places, example, self.part)
        with self.autocast():
            losses = group.loss(places, variances, *example)
        losses.sum().backward()
        return losses.detach()

    def _draws(self) -> Iterator[list[tuple[Places, Example]]]:
        """What each step learns from. Steps that were done before an interruption are passed over."""
        while True:
            step = self.first
            for examples in self._pool():
                if step >= self.done.step:
                    yield examples
                step += 1
            self.batches, self.first = self.batches + self.config.pool, step

    def _pool(self) -> Iterator[list[tuple[Places, Example]]]:
        """The steps of a few batches, those of one size together, each image `reuse` times in random order.

        Several processes hold every so many of the images, and so of those of any step.
        """
        batches, number = [next(self.source) for _ in range(self.config.pool)], self.part.rows
        strata = math.gcd(self.config.batch_size, *(count(inputs) * number for inputs in batches))
        for inputs in joined_by_size(batches):
            seen = self.see(inputs)
            places, pool = [seen.places(group.layers) for group in self.groups], self.examples(seen)
            del seen  # it would take as much memory again, for as long as the pool is used
            orders = shuffled(count(inputs) * number, strata, self.config.reuse, self.config.seed, self.first)
            for chosen in (part for order in orders for part in order.split(self.config.batch_size)):
                ours = chosen[self.part.row :: number] // number
                parts = [tuple(part[ours] for part in example) for example in pool]
                yield list(zip(places, parts, strict=True))

    def any_process(self, holds: bool) -> bool:
        """Asked now and then: the answer waits for the device."""
        return not self.done.step % LOG_EVERY and processes.any_of(holds) if self.part.rows > 1 else holds

    def _check_finite(self, losses: Tensor, step: int) -> None:
        if not losses.isfinite().all():
            names = [name for group in self.groups for name in group.layers]
            broken = [name for name, ok in zip(names, losses.isfinite().tolist(), strict=True) if not ok]
            raise T5Error(
                f"calibration failed at step {step}: the error of {', '.join(broken)} is not finite; "
                f"lower calibrate.lr ({self.config.lr}), or keep key_norm 'instance' (others can diverge)"
            )

    @torch.no_grad()
    def errors(self, seen: Seen) -> dict[str, float]:
        """Squared error over variance of every layer, whatever the objective."""
        with self.autocast():
            parts = [self._error(group, seen) for group in self.groups]
        names = [name for group in self.groups for name in group.layers]
        by_name = dict(zip(names, torch.cat(parts).tolist(), strict=True))
        return {name: by_name[name] for name in self.layers}

    def _error(self, group: LayerGroup, seen: Seen) -> Tensor:
        places, example = seen.places(group.layers), group.examples(seen)
        return group.error(places, group.variances(places, example, WHOLE), *example)

    def write_back(self) -> None:
        for group in self.groups:
            group.copy(to_layers=True)

    def save(self, folder: Path) -> None:
        """The pool is not kept: the teacher gives it again."""
        content: dict[str, Any] = {"done": asdict(self.done), "batches": self.batches, "first": self.first}
        content |= {"optimizer": self.optimizer.state_dict(), "inherited": [p.detach() for p in self._inherited()]}
        content["mixers"] = [group.mixer.state_dict() for group in self.groups]
        place = folder / f".step-{self.done.step:07d}"
        if processes.state().is_main_process:
            with checkpoints.writing(folder):
                checkpoints.begin(place)
                torch.save(content, place / STATE)
                checkpoints.finish(place, self.made_by, self.config.checkpoints_kept)

    def restore(self, folder: Path) -> bool:
        """Continue from the newest whole checkpoint; False where there is none."""
        place = None
        if processes.state().is_main_process:
            size = 3 * sum(parameter.nbytes for parameter in self.parameters)  # with Adam's two moments
            checkpoints.require_space(folder, size, self.config.checkpoints_kept, self.config.checkpoint_every)
            place = checkpoints.newest(folder, self.made_by)
        place = processes.all_know(place)
        if place is None:
            return False
        content = torch.load(place / STATE, map_location=self.device, weights_only=True)
        with checkpoints.loading(place):
            for group, weights in zip(self.groups, content["mixers"], strict=True):
                group.mixer.load_state_dict(weights)
            self.optimizer.load_state_dict(content["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(self._inherited(), content["inherited"], strict=True):
                    parameter.copy_(value)
        self.done, self.batches, self.first = Done(**content["done"]), content["batches"], content["first"]
        return True

    def _inherited(self) -> Iterator[nn.Parameter]:
        if self.config.lr_inherited:
            for layer in self.layers.values():
                for part in self.family.projections(layer):
                    yield from part.parameters()

    def _groups(self, seen: Seen) -> list[LayerGroup]:
        """Of one kind, and no more layers than a step goes through at once, whatever the number of processes."""
        kinds: dict[tuple, list[str]] = {}
        for name, layer in self.layers.items():
            kinds.setdefault(seen.kind_of(name, layer), []).append(name)
        groups = []
        for names in kinds.values():
            at_once = max(1, TOGETHER // (self.config.batch_size * seen.numbers(names[0])))
            number, parts = math.ceil(len(names) / at_once), len(seen.calls[names[0]].tokens)
            for layers in _shared_out(names, number):
                mine = {name: self.layers[name] for name in layers}
                options = self.config, self.device, self.compiled
                groups.append(LayerGroup(self.family, mine, self.sources, parts, *options))
        return groups

    def _source(self, name: str, layer: TTTLayer) -> nn.Module:
        """The attention that `layer` learns from."""
        try:
            source = self.teacher.get_submodule(name)
        except AttributeError:
            source = None
        if type(source) is not type(self.family.softmax_attention(layer)):
            present = "nothing" if source is None else f"a {type(source).__name__}"
            raise T5Error(f"the teacher has {present} at {name}; pass the softmax model that was converted")
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
        q = self.family.project(attention, AttentionCall((first.weight.new_zeros(1, 1, first.in_features),)))[0]
        return q.shape[1], q.shape[3], first.in_features


def _shared_out(names: list[str], number: int) -> list[list[str]]:
    """So many lists of consecutive names, of nearly the same length."""
    ends = [len(names) * index // number for index in range(number + 1)]
    return [names[start:end] for start, end in itertools.pairwise(ends)]


def _check_places(model: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = next(model.parameters()), next(teacher.parameters())
    if ours.device != theirs.device:
        raise T5Error(f"the teacher is on {theirs.device}, the model on {ours.device}; move one of them to the other")
    half = (dtypes(model) | dtypes(teacher)) - {torch.float32}
    if half and ours.device.type == "cpu":
        raise T5Error(
            f"weights are {half.pop()}, and on a CPU layers are fitted in float32; call .float() on both models"
        )


def _inputs(adapter: Adapter, teacher: nn.Module, batch: Any) -> Inputs:
    """What the teacher is called with, on its device, in float32."""
    inputs = adapter.inputs(batch)
    adapter.check_inputs(teacher, inputs)
    check_finite(inputs)
    return placed(inputs, next(teacher.parameters()).device, torch.float32)
