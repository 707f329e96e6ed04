"""The settings that every training has."""

from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from pydantic import Field

from t5lib.training.checkpoints import Kept
from t5lib.utils import processes
from t5lib.utils.config import AtLeastOne, BatchSize, Rate, Share, WholeNumber, settings
from t5lib.utils.devices import can_compile
from t5lib.utils.errors import T5Error

Decay = Annotated[float, Field(gt=0, lt=1)]
COMPILING_PAYS = 500  # steps: compiling takes as long as a minute
KINDS_COMPILED = 256  # of blocks or groups of layers, in one process


def to_compile(setting: bool | None, device: torch.device, steps: int) -> bool:
    """Whether a fit of so many steps is compiled; for None where that pays and has been tried."""
    if setting is None:
        return steps >= COMPILING_PAYS and processes.alone() and can_compile(device)
    return setting


def many_kinds_compiled() -> AbstractContextManager[None]:
    """Within, torch compiles one function for more kinds of arguments than it does by default, past which it would
    quietly run the rest uncompiled."""
    return torch._dynamo.config.patch(recompile_limit=KINDS_COMPILED)


@settings
class LoopConfig:
    """The part of a training recipe that does not depend on the loss.

    Attributes:
        batch_size: examples a forward pass, of all processes together.
        accumulate: forward passes a step. Several processes take them in turn where their number divides it, or else
            share each of them, so their number must divide `accumulate` or `batch_size`. A step is the same anyway.
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
        compile: torch.compile the transformer blocks, each by itself; one compilation serves all that are alike. Null
            does so on CUDA, in one process, for 500 steps or more.
        gradient_checkpointing: true to recompute the activations of every block in the backward pass instead of keeping
            them, or the share of the blocks that do so. The smallest share that fits into memory is the fastest; "auto"
            finds it on CUDA: the first step recomputes all blocks, and what memory it leaves, less a tenth, decides how
            many keep their activations from then on. Elsewhere "auto" keeps all.
        optimizer: "adamw"; "adamw8bit", whose state takes a quarter of the memory (needs bitsandbytes); "muon", which
            steps inherited matrices by their orthogonalized momentum (arXiv 2502.16982) and the rest as AdamW does.
        checkpoint_every: steps between checkpoints.
        checkpoints_kept: how many of them are kept: 2, in case a disk damages the newest. With 0 none is written, and
            an interrupted training starts over, or from an older checkpoint if there is one.
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
    compile: bool | None = None
    gradient_checkpointing: bool | Share | Literal["auto"] = False
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    checkpoint_every: AtLeastOne = 100
    checkpoints_kept: Kept = 2
    seed: WholeNumber = 0

    @property
    def recomputed_share(self) -> float:
        """The share of the blocks that recompute their activations; for "auto" the most that it may be."""
        return 1.0 if self.gradient_checkpointing == "auto" else float(self.gradient_checkpointing)


@settings
class RecordableConfig(LoopConfig):
    """A recipe whose passes can be recorded as CUDA graphs (t5lib.training.graphs).

    Attributes:
        graphs: record forward and backward pass as a CUDA graph, one for every size of batch, and replay it in each
            step. It helps where a card waits for Python, as with small models, and takes more memory: every graph
            keeps gradients of its own. One process, accumulate 1, no gradient_checkpointing.
        Others: see LoopConfig.
    """

    graphs: bool = False

    def __post_init__(self):
        if self.graphs and (self.accumulate > 1 or self.recomputed_share):
            raise T5Error(
                f"graphs is on with accumulate {self.accumulate} and gradient_checkpointing "
                f"{self.gradient_checkpointing}; a graph is one forward and backward pass that keeps its activations: "
                "set accumulate: 1 and gradient_checkpointing: false, or leave graphs out"
            )
