"""Stage `source` of denoisers: the pipeline's transformer in single precision, and its noise schedule beside it."""

import shutil
from dataclasses import dataclass

import t5lib
from tasks.denoisers.data import LatentsConfig
from tasks.denoisers.training import loss_of
from tasks.runtime.stage import Stage
from tasks.targets import diffusers_folder
from tasks.targets.classifier import device
from tasks.targets.denoiser import SCHEDULER


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Nothing is to be chosen: the denoiser is converted as it was fetched."""


SECTIONS = {"source": SourceConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    stage.params(SourceConfig)
    data = stage.params(LatentsConfig, "data")
    fetched, shards = stage.input("fetch"), stage.input("shards")
    model = diffusers_folder.transformer(fetched, stage.root)
    t5lib.save(model, stage.out)
    shutil.copytree(diffusers_folder.folder_of(fetched, stage.root) / "scheduler", stage.out / SCHEDULER)
    loss = loss_of(model.to(device()), data, shards, stage.out)
    return {"loss": loss, "parameters": sum(parameter.numel() for parameter in model.parameters())}
