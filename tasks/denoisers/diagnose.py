"""Stage `diagnose` of denoisers: shift ratio of every layer and head on noised latents."""

import t5lib
from tasks.denoisers.data import LatentsConfig
from tasks.denoisers.latents import latents, load, objective
from tasks.diagnose import DiagnoseConfig, write
from tasks.stage import Stage

SECTIONS = {"diagnose": DiagnoseConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    """On training images of one size, each at one noise level."""
    config, data = stage.params(DiagnoseConfig), stage.params(LatentsConfig, "data")
    source, shards = stage.input("source"), stage.input("shards")
    batch = next(latents(shards, "train", data).batches(config.images, seed=config.seed)(0))
    found = t5lib.diagnose(load(source), batch, objective=objective(source, data), seed=config.seed)
    return write(stage, found, config)
