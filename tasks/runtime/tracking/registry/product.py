"""What a kind of target hands over to be registered."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

WEIGHTS = "model/model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Product:
    """The finished model of a target.

    Attributes:
        kind: whose code loads it: a file of this folder.
        files: what is kept, by its place among the files that the code reads; WEIGHTS is one of them.
        settings: plain values that the code reads.
        scores: by name, as the stage `evaluate` found them.
        measure: the score that versions are compared by.
        better: which values of it are.
        scored_by: plain values; versions compare where these are the same.
    """

    kind: Literal["classifier", "denoiser"]
    files: dict[str, Path]
    settings: dict[str, Any]
    scores: dict[str, float]
    measure: str
    better: Literal["higher", "lower"]
    scored_by: list[Any]

    @property
    def tags(self) -> dict[str, str]:
        how = json.dumps([self.measure, self.better, self.scored_by], sort_keys=True)
        return {
            "measure": f"{self.measure} ({self.better} is better)",
            "score": f"{self.scores[self.measure]:.6g}",
            "scored_by": hashlib.sha256(how.encode()).hexdigest()[:16],
        }
