"""Training by every protocol: freeze (new parameters only), adapters, fine-tune, control (all of it).

What a model learns from is an Objective (t5lib.training.classifier, t5lib.training.denoiser); everything else is here:
what is trained and how fast, averaged weights, checkpoints, a look at every loss.
"""

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from t5lib.data.batches import Batches, open_batches
from t5lib.families import family_of
from t5lib.families.inputs import Inputs
from t5lib.training import checkpoints, graphs, lora, sharding
from t5lib.training.averages import AveragedWeights
from t5lib.training.loop import Done, Log, Work, cosine, run_steps, warmed_up
from t5lib.training.nonfinite import explain_blow_up
from t5lib.training.optimizers import OPTIMIZERS, freeze, groups
from t5lib.training.recipe import LoopConfig, many_kinds_compiled, to_compile
from t5lib.training.recomputed import memory_of, recomputed_blocks
from t5lib.training.stochastic import share_draws, undo
from t5lib.utils import processes
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from t5lib.utils.processes import Part
from t5lib.utils.seeds import derived_seed, own_random_states

E = TypeVar("E")  # an example: a batch as the objective wants it
MOMENTS = "optimizer.pt"  # in a checkpoint
DRAWN = 3  # keeps the random stream of a step apart from that of noise
# Some models have a weight that no forward uses, such as DINOv2's mask token; their tables are the same everywhere.
DDP = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True)


class Objective(ABC, Generic[E]):
    """What a model learns from. The trainer asks for an example of every batch, and for its loss.

    Attributes:
        in_graphs: whether passes are recorded as CUDA graphs (t5lib.training.graphs). `loss` then draws no random
            numbers, never waits for the device, and moves nothing to it.
    """

    in_graphs = False

    def begin(self, trainer: "Trainer") -> None:
        """Called once, when model and averaged weights are in their place."""

    def made_of(self) -> dict[str, Any]:
        """What, beside the recipe, must be the same for a training to go on from its checkpoint; JSON-ready."""
        return {}

    @abstractmethod
    def example(self, batch: Any, number: int, trainer: "Trainer") -> E:
        """A batch, of which this process has `trainer.part`, as `loss` wants it, on the device. `number` counts the
        batches of all processes from the start."""

    @abstractmethod
    def inputs(self, example: E) -> Inputs:
        """What the model is called with, for the search after a loss that is not finite."""

    def tensors(self, example: E) -> dict[str, Tensor]:
        """All that `loss` reads of an example, by name: what differs between the replays of a graph."""
        return self.inputs(example)

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
        batches: what the objective takes; see t5lib.data.batches. Every process passes the same.
        objective: what is learned, t5lib.training.classifier.Classification or t5lib.training.denoiser.Denoising.
        steps: optimizer steps in all.
        resume_dir: checkpoints; a second call with the same folder continues and, on a CPU, ends with the same bits.
        log: called in the main process with loss, learning rates, gradient norm, and the step.

    Raises:
        T5Error: nothing to train, weights in half precision, a missing bitsandbytes, a loss that is not finite
            (step, layers and advice named), a batch that the processes cannot share, checkpoints made by another
            recipe or code, or too little room for them.
        KeyboardInterrupt: Ctrl-C, at the end of the step and after a checkpoint has been written.
    """
    resume_dir = checkpoints.opened(resume_dir)
    narrow = {str(p.dtype) for p in model.parameters() if p.dtype.itemsize < 4}
    if narrow:
        raise T5Error(
            f"train: the model's weights are {', '.join(narrow)}, in which small steps are lost; load it with "
            "torch_dtype=torch.float32 and set precision: bf16"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated|Grad strides do not match bucket view")
        return Trainer(model, objective, config, steps).run(batches, resume_dir, log)


class Trainer(Work):
    """Model, optimizer, averaged weights and counters of one training; Accelerate places them.

    Attributes:
        plain: the model that is trained, without what DDP wraps around it. With FSDP2 a copy in pieces, whose weights
            `whole`, the model of the caller, gets at the end.
        compiled: whether blocks are.
    """

    def __init__(self, model: nn.Module, objective: Objective, config: LoopConfig, steps: int):
        processes.state()  # before Accelerate makes one of its own
        # Not its mixed precision: it would leave its autocast on the model for good.
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=not torch.accelerator.is_available(), kwargs_handlers=[DDP]
        )
        self.config, self.total, self.whole, self.objective = config, steps, model, objective
        if objective.in_graphs:
            graphs.check(self.device, processes.state().num_processes)
        self.in_pieces = sharding.wanted()
        self.part = part_of(config)
        self.adapter = family_of(model)
        make_optimizer = OPTIMIZERS[config.optimizer]()
        model.to("cpu" if self.in_pieces else self.device).train()
        model.zero_grad(set_to_none=True)
        set_seed(config.seed)  # of adapters
        self.frozen = freeze(model, config)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise T5Error(
                "train: no parameter of the model has requires_grad, so there is nothing to train; call "
                "model.requires_grad_() first, or only on those to be trained"
            )
        self.ema = AveragedWeights(model, config.ema) if config.ema else None
        if self.in_pieces:
            if self.ema:
                self.ema.module = self.beside(self.ema.module)
            model = self.beside(model)
        self.plain = model
        optimizer = make_optimizer(groups(model, config))
        self.model = model if self.in_pieces else self.accelerator.prepare(model)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.graphs = graphs.RecordedPasses(model, objective.tensors) if objective.in_graphs else None
        self.dropping = share_draws(model, self.part)
        self.compiled = to_compile(config.compile, self.device, steps)
        self.blocks_altered = contextlib.ExitStack()
        self.compile_blocks(model)
        recomputed = recomputed_blocks(model, config.gradient_checkpointing, memory_of(self.device))
        self.recomputation = self.blocks_altered.enter_context(recomputed)
        self.done = Done()
        pieces = {"strategy": "fsdp2"} if self.in_pieces else {}
        self.made_by = checkpoints.maker(model, config, steps=steps, **pieces, **objective.made_of())
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

    def beside(self, model: nn.Module) -> nn.Module:
        """A model in the place, and in the pieces, of the one that is trained: a teacher."""
        return sharding.sharded(model, self.device) if self.in_pieces else model.to(self.device)

    def compile_blocks(self, model: nn.Module) -> None:
        """Compile the model's blocks, or those of a teacher beside it, until the training ends, if it is to be so."""
        if self.compiled:
            self.blocks_altered.enter_context(compiled_blocks(model))

    def run(self, batches: Batches, resume_dir: Path | None, log: Log | None) -> TrainReport:
        """All steps that are not done yet; see `train`."""
        config = self.config
        try:
            if resume_dir:
                self.load(resume_dir)
            if not self.over(self.total):
                self.source = open_batches(batches, self.done.step * config.accumulate, self.part)
            run_steps(
                self,
                title=f"train ({config.trainable})",
                total=self.total,
                resume_dir=resume_dir if config.checkpoints_kept else None,
                every=config.checkpoint_every,
                log=log if self.accelerator.is_main_process else None,
            )
            if self.ema:
                self.plain.load_state_dict(self.ema.module.state_dict())
            if self.in_pieces:  # after an error they would wait for each other
                sharding.gather(self.plain, self.whole)
        finally:
            self.close()
        seconds = self.done.seconds
        count = self.total * config.batch_size * config.accumulate
        rate = count / max(seconds, 1e-9)
        return TrainReport(steps=self.total, seconds=seconds, samples_per_second=rate, loss=self.done.loss)

    def step(self) -> dict[str, float]:
        """One optimizer step over `accumulate` forward passes, or those of them that are this process's."""
        first = self.done.step * self.config.accumulate
        numbers = range(first + self.part.turn, first + self.config.accumulate, self.part.turns)
        batches = [(number, next(self.source)) for number in numbers]
        rates = self._set_rates()
        losses = []
        with self.recomputation.observed():
            for number, batch in batches:
                self._seed(number)
                example = self.objective.example(batch, number, self)
                last = number == numbers[-1]
                with self._gradients_shared(last):
                    losses.append(self.graphs(self._learn, example) if self.graphs else self._learn(example))
        norm = self.accelerator.clip_grad_norm_(self.plain.parameters(), self.config.clip_norm or math.inf)
        norm = sharding.full(norm)
        of_all = self.accelerator.gather(torch.stack([torch.stack(losses).mean(), norm]))
        values = of_all.tolist()  # the only wait for the device in a step
        value, norm = sum(values[::2]) / len(values[::2]), values[1]
        if not all(map(math.isfinite, values)):
            self._blow_up(values, example)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.plain, self.done.step + 1)
        self.recomputation.choose()
        return {"loss": value, **rates, "grad_norm": norm}

    def _learn(self, example: Any) -> Tensor:
        """Add an example's part of a step's gradient; returns its loss."""
        loss = self.objective.loss(example, self)
        self.accelerator.backward(loss / (self.config.accumulate // self.part.turns))
        return loss.detach()

    def _gradients_shared(self, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Around a backward pass, after which processes average their gradients or not yet."""
        if self.in_pieces:
            self.model.set_requires_gradient_sync(shared)
        elif not shared:
            return self.accelerator.no_sync(self.model)
        return contextlib.nullcontext()

    def _seed(self, number: int) -> None:
        """What is drawn while a batch is learned from follows from its number, in all processes that share it alike."""
        set_seed(derived_seed(self.config.seed, DRAWN, number) >> 32)

    def _blow_up(self, values: list[float], example: Any) -> None:
        """Raise, in all processes, what the first of them whose loss is not finite finds out; `values`: loss and norm
        of each."""
        broken = next((place for place, loss in enumerate(values[::2]) if not math.isfinite(loss)), 0)
        said = ""
        if self.accelerator.process_index == broken or self.in_pieces:
            self.blocks_altered.close()  # what looks for the cause hooks into every module
            inputs, step = self.objective.inputs(example), self.done.step + 1
            said = explain_blow_up(self.plain, inputs, self.config, step, *values[2 * broken : 2 * broken + 2])
        raise T5Error(processes.gathered(said)[broken])

    def any_process(self, holds: bool) -> bool:
        return processes.any_of(holds)

    def save(self, folder: Path) -> None:
        """Write `folder`/step-N; a kill at any moment leaves this one or the one before it whole.

        All processes have the same, and the first writes it; or all write their pieces. Not by Accelerate, whose
        checkpoints are of one number of processes and are unpickled.
        """
        place, main = folder / f".step-{self.done.step:07d}", self.accelerator.is_main_process
        with checkpoints.writing(folder):
            if main:
                checkpoints.begin(place)
            self.accelerator.wait_for_everyone()
            if self.in_pieces:
                sharding.save(place, *self._pieces())
                self.accelerator.wait_for_everyone()
            elif main:
                save_model(self.plain, str(place / "model.safetensors"))
                torch.save(self.optimizer.state_dict(), place / MOMENTS)
                if self.ema:
                    save_model(self.ema, str(place / "ema.safetensors"))
            if main:
                write_json(place / "done.json", asdict(self.done))
                checkpoints.finish(place, self.made_by, self.config.checkpoints_kept)
        self.accelerator.wait_for_everyone()

    def _pieces(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module | None]:
        return self.plain, self.optimizer.optimizer, self.ema.module if self.ema else None

    def load(self, folder: Path) -> None:
        """Continue from the newest whole checkpoint in `folder`, if there is one (t5lib.training.checkpoints)."""
        place = None
        if self.accelerator.is_main_process:
            config = self.config
            checkpoints.require_space(folder, self._checkpoint_size(), config.checkpoints_kept, config.checkpoint_every)
            place = checkpoints.newest(folder, self.made_by)
        place = processes.all_know(place)
        if place is None:
            return
        with checkpoints.loading(place):
            self.done = Done(**read_json(place / "done.json"))
            if self.in_pieces:
                sharding.load(place, *self._pieces())
                return
            load_model(self.plain, place / "model.safetensors")
            self.optimizer.load_state_dict(torch.load(place / MOMENTS, map_location="cpu", weights_only=True))
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
        self.blocks_altered.close()
        self.graphs = None  # their memory
        undo(self.dropping)
        if self.in_pieces:  # beside what lies in pieces, the whole may find no room
            del self.model, self.plain, self.optimizer, self.ema
            self.accelerator.free_memory()
            self.plain = self.whole.to(self.device)
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


def part_of(config: LoopConfig) -> Part:
    """What this process takes of the forward passes of every step.

    Raises:
        T5Error: the processes, so many as they are, cannot share them evenly.
    """
    number = processes.state().num_processes
    if config.accumulate % number == 0:
        return processes.turns()
    if config.batch_size % number == 0:
        return processes.rows()
    raise T5Error(
        f"train: {number} processes cannot share batches evenly with batch_size {config.batch_size} and accumulate "
        f"{config.accumulate}; make one of them a multiple of {number}, or change the number of processes"
    )


def rate_factor(step: int, total: int, config: LoopConfig) -> float:
    """Learning rate at `step` (from 0) as a part of the peak: linear warm-up, then cosine to `min_lr`."""
    warm = round(config.warmup * total)
    if step < warm:
        return warmed_up(step, warm)
    return cosine((step - warm) / max(total - warm, 1), config.min_lr)


@contextlib.contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Within, each transformer block of a model is compiled by itself; one compilation serves all of its kind.

    Blocks that differ in more than their weights (kind of attention, rate of stochastic depth) are compiled anew. At
    the end the model is a plain one. What was compiled serves the next model of the same kind in this process.
    """
    blocks = list(family_of(model).blocks(model))
    with many_kinds_compiled():
        try:
            for block in blocks:
                block.compile(dynamic=False)
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
