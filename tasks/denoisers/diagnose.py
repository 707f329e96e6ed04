"""Stage `diagnose` of denoisers: shift ratio of every layer and head on noised latents."""

import t5lib
from tasks.denoisers.data import LatentsConfig
from tasks.diagnose import DiagnoseConfig, write
from tasks.runtime.stage import Stage
from tasks.targets.denoiser import load, objective, some

SECTIONS = {"diagnose": DiagnoseConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    """On training images of one size, each at one noise level."""
    config, data = stage.params(DiagnoseConfig), stage.params(LatentsConfig, "data")
    source, shards = stage.input("source"), stage.input("shards")
    batch = some(shards, "train", data, config.images, config.seed, "diagnose.images")
    found = t5lib.diagnose(load(source), batch, objective=objective(source, data), seed=config.seed)
    return write(stage, found, config)
