"""Training by every protocol: freeze (new parameters only), adapters, fine-tune, control (all of it).

What a model learns from is an Objective (t5lib.training.classifier, t5lib.training.denoiser); everything else is here:
what is trained and how fast, averaged weights, checkpoints, a look at every loss.
"""

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from pydantic import Field
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from t5lib.conversion import new_parameters
from t5lib.data.batches import Batches, open_batches
from t5lib.families import family_of
from t5lib.families.inputs import Inputs
from t5lib.training import checkpoints, lora
from t5lib.training.checkpoints import Kept
from t5lib.training.loop import Done, Log, Work, cosine, run_steps, warmed_up
from t5lib.training.nonfinite import explain_blow_up
from t5lib.utils.config import AtLeastOne, BatchSize, Rate, Share, WholeNumber, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from t5lib.utils.seeds import own_random_states

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

E = TypeVar("E")  # an example: a batch as the objective wants it
KINDS_OF_BLOCKS = 256  # that one process may compile
Decay = Annotated[float, Field(gt=0, lt=1)]


@settings
class LoopConfig:
    """The part of a training recipe that does not depend on the loss.

    Attributes:
        batch_size: examples a process and forward pass; times `accumulate` and the number of processes for a step.
        lr, lr_new: peak learning rates of inherited and of new parameters (adapters count as new).
        min_lr: the cosine's end, as a part of the peak; 1 for a constant rate.
        warmup: part of all steps with linearly rising learning rate.
        weight_decay: AdamW's, for matrices; vectors, biases and what timm spares (position tables) get none.
        clip_norm: bound of the gradient's norm; null for none.
        ema: decay of the averaged weights, which are then the result; null for none.
        trainable: "all"; "new" for the freeze protocol; "lora" for low-rank adapters of the projections around the
            new layers, merged at the end, everything else frozen (t5lib.training.lora); of a softmax model, around
            all attentions.
        lora_rank, lora_alpha: width of the adapters, and their factor times lora_rank.
        precision: "fp32" or "bf16" (autocast).
        compile: torch.compile the transformer blocks, each by itself; one compilation serves all that are alike.
        gradient_checkpointing: compute a block's activations again in the backward pass instead of keeping them.
        optimizer: "adamw"; "adamw8bit", whose state takes a quarter of the memory (needs bitsandbytes); "muon", which
            steps inherited matrices by their orthogonalized momentum (arXiv 2502.16982) and the rest as AdamW does.
        checkpoint_every: steps between checkpoints.
        checkpoints_kept: how many of them are kept, for the case that a disk damages the newest.
    """

    batch_size: BatchSize = 64
    accumulate: BatchSize = 1
    lr: Rate = 2e-5
    lr_new: Rate = 4e-4
    min_lr: Share = 0.01
    warmup: Share = 0.1
    weight_decay: Rate = 0.05
    clip_norm: Annotated[float, Field(ge=1e-6)] | None = 1.0
    ema: Decay | None = None
    trainable: Literal["all", "new", "lora"] = "all"
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8
    lora_alpha: Annotated[float, Field(gt=0, le=1e4)] = 16.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    checkpoint_every: AtLeastOne = 100
    checkpoints_kept: Kept = 2
    seed: WholeNumber = 0


class Objective(ABC, Generic[E]):
    """What a model learns from. The trainer asks for an example of every batch, and for its loss."""

    def begin(self, trainer: "Trainer") -> None:
        """Called once, when model and averaged weights are in their place."""

    def made_of(self) -> dict[str, Any]:
        """What, beside the recipe, must be the same for a training to go on from its checkpoint; JSON-ready."""
        return {}

    @abstractmethod
    def example(self, batch: Any, number: int, trainer: "Trainer") -> E:
        """A batch as `loss` wants it, on the device. `number` counts the batches of this process from the start."""

    @abstractmethod
    def inputs(self, example: E) -> Inputs:
        """What the model is called with, for the search after a loss that is not finite."""

    @abstractmethod
    def loss(self, example: E, trainer: "Trainer") -> Tensor:
        """A scalar; `trainer.output` runs the model."""


@dataclass(kw_only=True)
class TrainReport:
    """`steps` done in all, wall-clock `seconds` of training (earlier runs included), examples a second, last loss."""

    steps: int
    seconds: float
    samples_per_second: float
    loss: float


@own_random_states()
def train(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    config: LoopConfig,
    *,
    steps: int,
    resume_dir: Path | str | None = None,
    log: Log | None = None,
) -> TrainReport:
    """Train `model` in place.

    Args:
        model: of any family, converted or not, in float32.
        batches: what the objective takes; see t5lib.data.batches. Every process passes its own part.
        objective: what is learned, t5lib.training.classifier.Classification or t5lib.training.denoiser.Denoising.
        steps: optimizer steps in all.
        resume_dir: checkpoints; a second call with the same folder continues and, on a CPU, ends with the same bits.
        log: called in the main process with loss, learning rates, gradient norm, and the step.

    Raises:
        T5Error: nothing to train, weights in half precision, a missing bitsandbytes, a loss that is not finite
            (step, layers and advice named), checkpoints made by another recipe, code or number of processes, or
            too little room for them.
        KeyboardInterrupt: Ctrl-C, at the end of the step and after a checkpoint has been written.
    """
    resume_dir = checkpoints.opened(resume_dir)
    narrow = {str(p.dtype) for p in model.parameters() if p.dtype.itemsize < 4}
    if narrow:
        raise T5Error(
            f"train: the model's weights are {', '.join(narrow)}, in which small steps are lost; load it with "
            "torch_dtype=torch.float32 and set precision: bf16"
        )
    return Trainer(model, objective, config, steps).run(batches, resume_dir, log)


class Trainer(Work):
    """Model, optimizer, averaged weights and counters of one training; Accelerate places them."""

    def __init__(self, model: nn.Module, objective: Objective, config: LoopConfig, steps: int):
        # Not Accelerate's mixed precision: it would leave its autocast on the model for good. `cpu`: or else several
        # processes on a machine without accelerator would each train on their own.
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
        self.config, self.total, self.plain, self.objective = config, steps, model, objective
        self.adapter = family_of(model)
        make_optimizer = {"adamw": _adamw, "adamw8bit": _adamw8bit, "muon": _muon}[config.optimizer]()
        model.to(self.device).train()
        model.zero_grad(set_to_none=True)
        set_seed(config.seed)  # adapters start alike in all processes
        self.frozen = freeze(model, config)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise T5Error(
                "train: no parameter of the model has requires_grad, so there is nothing to train; call "
                "model.requires_grad_() first, or only for those that shall learn"
            )
        set_seed(config.seed, device_specific=True)  # Python, NumPy (mixup) and torch
        self.ema = _averaged(model, config.ema) if config.ema else None
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(_groups(model, config)))
        self.compiled = contextlib.ExitStack()
        self.compile_blocks(model)
        if config.gradient_checkpointing:
            self.adapter.checkpoint_gradients(model, True)
        self.done = Done()
        processes = self.accelerator.num_processes
        self.made_by = checkpoints.maker(model, config, steps=steps, processes=processes, **objective.made_of())
        objective.begin(self)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def output(self, inputs: Inputs, model: nn.Module | None = None) -> Tensor:
        """What the model (or a teacher beside it) says of inputs."""
        with self.autocast():
            return self.adapter.call(model or self.model, inputs)

    def compile_blocks(self, model: nn.Module) -> None:
        """Compile the model's blocks, or those of a teacher beside it, until the training ends, if it is to be so."""
        if self.config.compile:
            self.compiled.enter_context(compiled_blocks(model))

    def run(self, batches: Batches, resume_dir: Path | None, log: Log | None) -> TrainReport:
        """All steps that are not done yet; see `train`."""
        config = self.config
        try:
            if resume_dir:
                self.load(resume_dir)
            if not self.over(self.total):
                self.source = open_batches(batches, self.done.step * config.accumulate)
            run_steps(
                self,
                title=f"train ({config.trainable})",
                total=self.total,
                resume_dir=resume_dir,
                every=config.checkpoint_every,
                log=log if self.accelerator.is_main_process else None,
            )
            if self.ema:
                self.plain.load_state_dict(self.ema.module.state_dict())
        finally:
            self.close()
        seconds = self.done.seconds
        count = self.total * config.batch_size * config.accumulate * self.accelerator.num_processes
        rate = count / max(seconds, 1e-9)
        return TrainReport(steps=self.total, seconds=seconds, samples_per_second=rate, loss=self.done.loss)

    def step(self) -> dict[str, float]:
        """One optimizer step over `accumulate` forward passes."""
        batches = [next(self.source) for _ in range(self.config.accumulate)]
        rates = self._set_rates()
        losses = []
        for index, batch in enumerate(batches):
            example = self.objective.example(batch, self.done.step * len(batches) + index, self)
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.objective.loss(example, self)
                self.accelerator.backward(loss / len(batches))
            losses.append(loss.detach())
        norm = self.accelerator.clip_grad_norm_(self.plain.parameters(), self.config.clip_norm or math.inf)
        value, norm = torch.stack([torch.stack(losses).mean(), norm]).tolist()  # the only wait for the device in a step
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.compiled.close()  # what looks for the cause hooks into every module
            inputs = self.objective.inputs(example)
            raise T5Error(explain_blow_up(self.plain, inputs, self.config, self.done.step + 1, value, norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.plain, step=self.done.step + 1)
        return {"loss": value, **rates, "grad_norm": norm}

    def any_process(self, holds: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return holds
        if holds:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def save(self, folder: Path) -> None:
        """Write `folder`/step-N; a kill at any moment leaves this one or the one before it whole."""
        main, place = self.accelerator.is_main_process, folder / f".step-{self.done.step:07d}"
        with checkpoints.writing(folder):
            if main:
                checkpoints.begin(place)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(place))
            self.accelerator.wait_for_everyone()
            if main:
                # not registered with Accelerate, which would unpickle them when they are loaded
                write_json(place / "done.json", asdict(self.done))
                if self.ema:
                    save_model(self.ema, str(place / "ema.safetensors"))
                checkpoints.finish(place, self.made_by, self.config.checkpoints_kept)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Continue from the newest whole checkpoint in `folder`, if there is one (t5lib.training.checkpoints)."""
        places: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            checkpoints.require_space(folder, self._checkpoint_size(), self.config.checkpoints_kept)
            places = [checkpoints.newest(folder, self.made_by)]
        place = broadcast_object_list(places)[0]
        if place is None:
            return
        with checkpoints.loading(place):
            self.accelerator.load_state(str(place))
            self.done = Done(**read_json(place / "done.json"))
            if self.ema:
                load_model(self.ema, place / "ema.safetensors")

    def _checkpoint_size(self) -> int:
        """About how many bytes a checkpoint takes."""
        weights = sum(tensor.nbytes for tensor in self.plain.state_dict().values())
        trained = sum(parameter.nbytes for parameter in self.plain.parameters() if parameter.requires_grad)
        moments = trained // 2 if self.config.optimizer == "adamw8bit" else 2 * trained
        return weights * (2 if self.ema else 1) + moments

    def close(self) -> None:
        """The model is a plain one again, in eval mode, with a gradient for everything that had one."""
        self.compiled.close()
        if self.config.gradient_checkpointing:
            self.adapter.checkpoint_gradients(self.plain, False)
        if self.config.trainable == "lora":
            lora.merge(self.plain)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.plain.eval()
        self.accelerator.free_memory()

    def _set_rates(self) -> dict[str, float]:
        factor = rate_factor(self.done.step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return {"lr_inherited": self.config.lr * factor, "lr_new": self.config.lr_new * factor}


def rate_factor(step: int, total: int, config: LoopConfig) -> float:
    """Learning rate at `step` (from 0) as a part of the peak: linear warm-up, then cosine to `min_lr`."""
    warm = round(config.warmup * total)
    if step < warm:
        return warmed_up(step, warm)
    return cosine((step - warm) / max(total - warm, 1), config.min_lr)


@contextlib.contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Within, each transformer block of a model is compiled by itself; one compilation serves all of its kind.

    Blocks that differ in more than their weights (kind of attention, rate of stochastic depth) are compiled anew, more
    often than torch allows by default, past which it would quietly run the rest uncompiled. At the end the model is a
    plain one. What was compiled serves the next model of the same kind in this process.
    """
    blocks = list(family_of(model).blocks(model))
    with torch._dynamo.config.patch(recompile_limit=KINDS_OF_BLOCKS):
        try:
            for block in blocks:
                block.compile(dynamic=False)
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


def _averaged(model: nn.Module, decay: float) -> "ModelEmaV3":
    from timm.utils import ModelEmaV3  # timm takes seconds to import

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def freeze(model: nn.Module, config: LoopConfig) -> list[nn.Parameter]:
    """Leave only what `config.trainable` names with a gradient; returns the parameters it froze.

    Raises:
        T5Error: "new" on a model without converted layers.
    """
    if config.trainable == "all":
        return []
    if config.trainable == "lora":
        before = [p for p in model.parameters() if p.requires_grad]
        lora.attach(model, config.lora_rank, config.lora_alpha)
        return before
    new = set(new_parameters(model).values())
    if not new:
        raise T5Error("the freeze protocol trains the new parameters, but this model has none; convert it first")
    frozen = [p for p in model.parameters() if p.requires_grad and p not in new]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _groups(model: nn.Module, config: LoopConfig) -> list[dict]:
    """Parameters by (new or inherited, decayed or not): their learning rates and weight decay differ."""
    new = set(new_parameters(model)) | {name for name, _ in model.named_parameters() if "lora_" in name}
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in spared
            groups.setdefault((name in new, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak": config.lr_new if is_new else config.lr,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "use_fallback": is_new or not decayed,  # of Muon: AdamW
        }
        for (is_new, decayed), parameters in groups.items()
    ]


def _adamw() -> Callable[[list[dict]], torch.optim.Optimizer]:
    return functools.partial(torch.optim.AdamW, fused=torch.cuda.is_available())


def _adamw8bit() -> Callable[[list[dict]], torch.optim.Optimizer]:
    with contextlib.suppress(ImportError):
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    raise T5Error("train: optimizer 'adamw8bit' needs bitsandbytes; install it (pip install bitsandbytes), or 'adamw'")


def _muon() -> Callable[[list[dict]], torch.optim.Optimizer]:
    from timm.optim.muon import Muon  # timm takes seconds to import

    # Its steps are as long as AdamW's would be, so that the same rates serve.
    return functools.partial(Muon, adjust_lr_fn="match_rms_adamw", betas=(0.9, 0.999))
