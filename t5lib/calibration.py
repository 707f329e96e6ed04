"""Attention transfer: fit every new layer to the softmax layer it replaces, without labels, before any fine-tune.

The softmax model (teacher) runs on images; each of its attentions gives an input and an output, and the new layer of
the same place learns to map one to the other. The layers do not see each other, so one pass of the teacher serves
them all, and since layers of one kind differ only in their heads, they are fitted as one mixer with L·H heads.

Shapes: B images, L layers, H heads, N tokens, D head width, C channels.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.layers import Attention
from torch import Tensor, nn

from t5lib.batches import Batches, images_of, open_batches
from t5lib.config import one_of
from t5lib.conversion import ttt_layers
from t5lib.errors import T5Error
from t5lib.families import timm_vit
from t5lib.layers.attention import TTTAttention, project
from t5lib.layers.mixers import make_mixer
from t5lib.layers.settings import T5Config
from t5lib.progress import progress

Log = Callable[[dict[str, float], int], None]
LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How the new layers are fitted.

    Attributes:
        steps: optimizer steps; 0 skips calibration.
        batch_size: images a step.
        lr: peak learning rate of the new weights (Adam); linear warm-up over `warmup` steps, then cosine to 0.
        lr_inherited: peak learning rate of the q, k and v projections and q and k norms, which are fitted along; 0
            keeps them as they are, at the price of a larger error (docs/results).
        pool: batches of teacher activations held at once; steps draw their images from this pool.
        reuse: how often each image of a pool is used before the pool is replaced.
        checkpoint_every: steps between checkpoints (they fall on the end of a pool).
        objective: "output" (squared error of the layer's output over its variance), or "attention" (cross-entropy to
            the softmax map, as Hedgehog does, arXiv 2402.04347; for mixers that have a map, at quadratic cost).
        compile: torch.compile the fitting step (worth it on CUDA).
        seed: the order in which images are drawn from a pool.
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
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> CalibrationReport:
    """Fit the new layers of `model`, in place, to the attentions of `teacher`.

    Args:
        model: a converted model (t5lib.convert).
        teacher: the softmax model it was converted from, on the same device.
        batches: images (B, 3, H, W), or tuples that begin with them (labels are not used); see t5lib.batches.
        config: the recipe.
        resume_dir: where partial work is kept; a second call with the same folder continues from there.
        log: called with {"loss": …, "lr": …} and the step.

    Raises:
        T5Error: the models do not match, or the loss is not finite.
    """
    config = config or CalibrateConfig()
    fit = _Fit(model, teacher, config)
    source = open_batches(batches, 0)
    probe = images_of(next(source))  # measured on, left out of the fit
    report = CalibrationReport(error_before=fit.errors(probe), steps=config.steps)
    state = fit.restore(resume_dir)
    if state["step"]:
        source = open_batches(batches, state["batches"])
    try:
        with progress("calibrate", config.steps, state["step"]) as bar:
            while state["step"] < config.steps:
                begun, first = time.monotonic(), state["step"]
                pool = fit.capture(torch.cat([images_of(next(source)).to(fit.device) for _ in range(config.pool)]))
                state["batches"] += config.pool
                for chosen in _draws(len(pool[0][0]), config, first):
                    loss = fit.step([tuple(part[chosen] for part in parts) for parts in pool], state["step"])
                    state["step"] += 1
                    _tell(loss, fit, state["step"], log, bar)
                    if state["step"] == config.steps:
                        break
                state["seconds"] += time.monotonic() - begun
                if resume_dir and state["step"] // config.checkpoint_every > first // config.checkpoint_every:
                    fit.checkpoint(resume_dir, state)
    finally:
        fit.write_back()  # also when interrupted: a model half of whose layer was fitted would be of no use
    report.seconds, report.error_after = state["seconds"], fit.errors(probe)
    return report


class _Fit:
    """The new layers of a model, those of one kind as one mixer, their optimizer, and the teacher they learn from."""

    def __init__(self, model: nn.Module, teacher: nn.Module, config: CalibrateConfig):
        self.config, self.layers, self.teacher = config, ttt_layers(model), teacher.eval()
        if not self.layers:
            raise T5Error("this model has no new layer to calibrate; convert it first (t5lib.convert)")
        self.sources = {name: _softmax_source(teacher, name, layer) for name, layer in self.layers.items()}
        self.device = next(teacher.parameters()).device
        self.grid = next(iter(self.layers.values())).grid
        self.kinds = [_Kind(layers, config, self.device) for layers in _by_config(self.layers)]
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

    def autocast(self) -> torch.autocast:
        """bf16 on CUDA, where the fit is bound by memory; full precision on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def capture(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """Run the teacher on (B, 3, H, W). For each kind the layers' inputs and what they shall give: see _Kind."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        hooks = [timm_vit.follow_images(self.teacher, self.grid)]
        for name, source in self.sources.items():
            hooks.append(source.register_forward_pre_hook(_keeper(inputs, name)))
            hooks.append(source.norm.register_forward_pre_hook(_keeper(outputs, name)))
        try:
            with self.autocast():
                self.teacher(images.to(self.device, non_blocking=True))
                return [kind.examples(inputs, outputs, self.sources) for kind in self.kinds]
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, batch: list[tuple[Tensor, ...]], step: int) -> Tensor:
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
    def errors(self, images: Tensor) -> dict[str, float]:
        """Squared error over variance of every layer on `images`, whatever the objective."""
        with self.autocast():
            parts = [kind.error(*part) for kind, part in zip(self.kinds, self.capture(images), strict=True)]
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
                for part in (layer.qkv, layer.q_norm, layer.k_norm):
                    yield from part.parameters()


class _Kind:
    """Layers of one T5Config, fitted as one mixer of L·H heads.

    An example is a tuple: inputs x (B, L, N, C), softmax outputs (B, L, N, H·D) and, for the objective "attention",
    the teacher's q and k (B, L·H, N, D). Where neither projections nor inputs are trained, x is left out and the
    layers' q, k and v (B, L·H, N, D) come first.
    """

    def __init__(self, layers: dict[str, TTTAttention], config: CalibrateConfig, device: torch.device):
        first = next(iter(layers.values()))
        self.layers, self.grid, self.objective = layers, first.grid, config.objective
        settings = first.mixer.config
        self.mixer = make_mixer(first.num_heads, first.head_dim, settings, len(layers)).to(device)
        if config.objective == "attention" and not hasattr(self.mixer, "attention_map"):
            raise T5Error(
                f"calibrate: objective 'attention' needs a mixer with an attention map, and inner '{settings.inner}' "
                "has none; use objective 'output'"
            )
        if config.objective == "attention" and (
            settings.rescale or (settings.key_norm, settings.locality) != ("none", "none")
        ):
            raise T5Error(
                f"calibrate: objective 'attention' compares maps of the projections as they are, but key_norm is "
                f"'{settings.key_norm}', locality '{settings.locality}' and rescale {settings.rescale}; set them to "
                "'none', 'none' and false, or use objective 'output'"
            )
        self.projected = not config.lr_inherited and settings.convolution != "cpe"
        self.copy(to_layers=False)
        self.loss = self._attention_loss if config.objective == "attention" else self.error
        if config.compile:
            self.loss = torch.compile(self.loss)

    def examples(
        self, inputs: dict[str, Tensor], outputs: dict[str, Tensor], sources: dict[str, Attention]
    ) -> tuple[Tensor, ...]:
        target = torch.stack([outputs[name] for name in self.layers], dim=1)
        x = torch.stack([inputs[name] for name in self.layers], dim=1).to(target.dtype)  # autocast would, every step
        given = self._project(x) if self.projected else (x,)
        if self.objective == "output":
            return *given, target
        parts = [project(sources[name], inputs[name])[:2] for name in self.layers]
        return *given, target, *(torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def error(self, *example: Tensor) -> Tensor:
        """Squared error of each layer's heads over the variance of its target, (L,)."""
        (q, k, v), (target, *_) = self._split(example)
        o = self.mixer(q, k, v, self.grid)
        B, _, N, D = o.shape
        o = o.view(B, len(self.layers), -1, N, D).transpose(2, 3).flatten(3).float()
        target = target.float()
        variance = target.var(dim=(0, 2, 3), correction=0)
        return (o - target).square().mean(dim=(0, 2, 3)) / variance

    def _attention_loss(self, *example: Tensor) -> Tensor:
        """Cross-entropy from the teacher's softmax map to the mixer's map, mean over heads and queries, (L,)."""
        (q, k, _), (_, teacher_q, teacher_k) = self._split(example)
        wanted = (teacher_q.float() * teacher_q.shape[-1] ** -0.5 @ teacher_k.float().mT).softmax(-1)
        given = self.mixer.attention_map(q, k).float().clamp_min(1e-8)
        return -(wanted * given.log()).sum(-1).unflatten(1, (len(self.layers), -1)).mean(dim=(0, 2, 3))

    def _split(self, example: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The layers' q, k, v, and what is to be matched."""
        if self.projected:
            return example[:3], example[3:]
        return self._project(example[0]), example[1:]

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, L, N, C) to q, k, v, each (B, L·H, N, D)."""
        together = x.transpose(1, 2).flatten(2)  # the layers' channels side by side, as the stacked mixer has them
        prepared = self.mixer.prepare(together, self.grid).unflatten(2, (len(self.layers), -1))
        parts = [project(layer, prepared[:, :, index]) for index, layer in enumerate(self.layers.values())]
        return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    @torch.no_grad()
    def copy(self, *, to_layers: bool) -> None:
        """Between the layers' mixers and the one whose heads are all of theirs, in order."""
        own = [_tensors(layer.mixer) for layer in self.layers.values()]
        for name, whole in _tensors(self.mixer).items():
            for part, tensors in zip(whole.chunk(len(own)), own, strict=True):
                source, destination = (part, tensors[name]) if to_layers else (tensors[name], part)
                destination.copy_(source)


def _tensors(mixer: nn.Module) -> dict[str, Tensor]:
    return dict(mixer.named_parameters()) | dict(mixer.named_buffers())


def _by_config(layers: dict[str, TTTAttention]) -> list[dict[str, TTTAttention]]:
    kinds: dict[T5Config, dict[str, TTTAttention]] = {}
    for name, layer in layers.items():
        kinds.setdefault(layer.mixer.config, {})[name] = layer
    return list(kinds.values())


def _keeper(kept: dict[str, Tensor], name: str):
    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept[name] = arguments[0]

    return keep


def _softmax_source(teacher: nn.Module, name: str, layer: TTTAttention) -> Attention:
    """The attention that `layer` learns from."""
    try:
        source = teacher.get_submodule(name)
    except AttributeError:
        source = None
    if not isinstance(source, Attention):
        found = "nothing" if source is None else f"a {type(source).__name__}"
        raise T5Error(f"the teacher has {found} at {name}; pass the softmax model that was converted")
    theirs, ours = ((a.num_heads, a.head_dim, a.qkv.in_features) for a in (source, layer))
    if theirs != ours:
        raise T5Error(
            f"{name} of the teacher has (heads, width, channels) {theirs}, of the model {ours}; "
            "pass the softmax model that was converted"
        )
    return source


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
