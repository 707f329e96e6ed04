"""The section `data` of denoisers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """How encoded images are read, and what a denoiser learns from them.

    Attributes:
        drop: part of the captions or labels that is left out in training, for guidance.
        resident: hold all latents in the memory of the device; for small sets.
        workers: processes that read ahead; 0 reads when needed.
        eval_batch_size: images at once where nothing is learned.
        objective: changes to what the pipeline's scheduler stands for, such as {weighting: mode}
            (t5lib.training.objectives).
    """

    drop: float = 0.1
    resident: bool = False
    workers: int = 2
    eval_batch_size: int = 16
    objective: dict[str, Any] = field(default_factory=dict)
