"""What MLflow runs where a registered classifier is loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Classifier(PythonModel):
    """Images (N, H, W, 3), RGB, uint8, of any size, become {"logits": (N, classes) float32, "label": (N,) names}.

    They are resized, cropped and normalized as validation images were.
    """

    BATCH = 64

    def load_context(self, context: PythonModelContext) -> None:
        import torch

        import t5lib
        from t5lib.data.images import DataConfig, transform
        from t5lib.utils.config import from_dict

        target = Path(context.artifacts["target"])
        settings = json.loads((target / "settings.json").read_text(encoding="utf-8"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        automatic = "bf16" if device == "cuda" else "fp32"
        self.precision = automatic if settings["precision"] == "auto" else settings["precision"]
        self.classes = np.array(settings["classes"])
        self.transform = transform(from_dict(DataConfig, settings["data"], "settings.json: data"))
        self.model = t5lib.load(target / "model", device)

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        import torch
        from PIL import Image

        from t5lib.evaluation.classifier import predict

        def batch(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.stack([self.transform(Image.fromarray(image)) for image in images]), torch.zeros(len(images))

        batches = (batch(model_input[start : start + self.BATCH]) for start in range(0, len(model_input), self.BATCH))
        logits = predict({"model": self.model}, batches, precision=self.precision)[0]["model"].numpy()
        return {"logits": logits, "label": self.classes[logits.argmax(-1)]}


set_model(Classifier())
