"""Stage `explain`: what conversion did to every layer, softmax source beside fine-tuned model, with pictures."""

from dataclasses import dataclass

import torch

import t5lib
from t5lib.data.images import DataConfig, ShardSet, eval_batches, transform
from t5lib.report import explanation_plots, plots
from t5lib.utils import files
from t5lib.utils.errors import T5Error
from tasks.runtime.stage import Stage, main
from tasks.targets.classifier import device


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What is measured on.

    Attributes:
        images: validation images for errors, CKA and shift ratios.
        map_images: how many of them for attention distances and maps, which cost more.
        queries: patches whose attention distance is taken.
        probes: precision of a converted layer's attention map (t5lib.implicit_attention).
    """

    images: int = 64
    map_images: int = 4
    queries: int = 49
    probes: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise T5Error(f"explain: {name} is {value}; expected 1 or more")


SECTIONS = {"explain": ExplainConfig, "data": DataConfig}


def run(stage: Stage) -> dict[str, float]:
    """Write explanation.json and the pictures; every layer's numbers become curves over the layers."""
    config, data = stage.params(ExplainConfig), stage.params(DataConfig, "data")
    softmax, converted = (t5lib.load(stage.input(name), device()) for name in ("source", "finetune"))
    shards = ShardSet.read(stage.input("shards") / "val.json")
    batches = eval_batches(shards, transform(data), batch_size=data.eval_batch_size, limit=config.images)
    images = torch.cat([images for images, _ in batches])
    limits = {"map_images": config.map_images, "queries": config.queries, "probes": config.probes}
    found = t5lib.explain(softmax, converted, images, **limits)
    files.write_json(stage.out / "explanation.json", found.as_dict())
    stage.artifact(stage.out / "explanation.json")
    pictures = explanation_plots.as_pictures(images[: config.map_images], data.mean, data.std)
    for name, figure in explanation_plots.all_pictures(found.as_dict(), pictures).items():
        plots.save(figure, stage.out / f"{name}.png")
        stage.artifact(stage.out / f"{name}.png")
    for number, values in enumerate(found.by_layer()):
        stage.log(values, step=number)
    return found.summary() | {"images": len(images)}


if __name__ == "__main__":
    main(run)
