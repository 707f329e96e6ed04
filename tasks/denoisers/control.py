"""Stage `control` of denoisers: the softmax source fine-tuned with the very recipe of `finetune`."""

from t5lib.training.denoiser import DenoiserTrainConfig
from tasks.denoisers.data import LatentsConfig
from tasks.denoisers.finetune import finetune
from tasks.runtime.stage import Stage

SECTIONS = {"finetune": DenoiserTrainConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    return finetune(stage, "source")
