"""What MLflow runs where a registered denoiser is loaded."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Denoiser(PythonModel):
    """A table with the column `prompt` (or `class`, a number) and perhaps `seed` becomes images (N, H, W, C) uint8.

    The transformer is the converted one. The pipeline's other parts are in the model too, or come from the hub where
    the target's did. Parameters: steps, guidance.
    """

    def load_context(self, context: PythonModelContext) -> None:
        import torch

        import t5lib
        from t5lib.evaluation.generation import GenerateConfig
        from t5lib.utils.config import from_dict

        target = Path(context.artifacts["target"])
        settings = json.loads((target / "settings.json").read_text(encoding="utf-8"))
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        transformer = t5lib.load(target / "model", device)
        torch.nn.Module.to(transformer, dtype)  # diffusers' own `to` warns of every cast
        hub = settings["hub"] or {"source": target / "pipeline"}
        self.pipeline = t5lib.load_pipeline(**hub, transformer=transformer, torch_dtype=dtype).to(device)
        self.takes = settings["takes"]
        self.sampling = from_dict(GenerateConfig, settings["sampling"], "settings.json: sampling")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        from t5lib.evaluation.generation import sample

        wanted = model_input[self.takes].tolist()
        seeds = model_input["seed"].tolist() if "seed" in model_input else list(range(len(wanted)))
        sampling = dataclasses.replace(self.sampling, **(params or {}))
        return sample(self.pipeline, wanted, seeds, sampling).permute(0, 2, 3, 1).numpy()


set_model(Denoiser())
