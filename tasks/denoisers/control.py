"""Stage `control` of denoisers: the softmax source fine-tuned with the very recipe of `finetune`."""

from t5lib.diffusion.training import DiffusionTrainConfig
from tasks.denoisers.data import LatentsConfig
from tasks.denoisers.finetune import finetune
from tasks.stage import Stage

SECTIONS = {"finetune": DiffusionTrainConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    return finetune(stage, "source")
