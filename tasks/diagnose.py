"""Stage `diagnose`: shift ratio of every layer and head on real images, with a random-init control, and its picture."""

from dataclasses import dataclass

import torch

import t5lib
from t5lib.analysis.key_shift import Diagnosis
from t5lib.data.images import DataConfig, ShardSet, eval_batches, transform
from t5lib.report import plots
from t5lib.utils import files
from tasks.runtime.stage import Stage, main
from tasks.targets.classifier import device


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """`images`: how many training images the shift ratio is averaged over."""

    images: int = 64
    seed: int = 0


SECTIONS = {"diagnose": DiagnoseConfig, "data": DataConfig}


def run(stage: Stage) -> dict:
    config, data = stage.params(DiagnoseConfig), stage.params(DataConfig, "data")
    model = t5lib.load(stage.input("source"), device())
    shards = ShardSet.read(stage.input("shards") / "train.json")
    batches = eval_batches(shards, transform(data), batch_size=data.eval_batch_size, limit=config.images)
    found = t5lib.diagnose(model, torch.cat([images for images, _ in batches]), seed=config.seed)
    return write(stage, found, config)


def write(stage: Stage, found: Diagnosis, config: DiagnoseConfig) -> dict[str, float]:
    """The ratios and their picture; returns the metrics."""
    files.write_json(stage.out / "shift_ratio.json", found.as_dict())
    plots.save(plots.shift_ratio_map(**found.as_dict()), stage.out / "shift_ratio.png")
    stage.artifact(stage.out / "shift_ratio.json")
    stage.artifact(stage.out / "shift_ratio.png")
    return found.summary() | {"images": config.images}


if __name__ == "__main__":
    main(run)
