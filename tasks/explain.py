"""Stage `explain`: what conversion did to every layer, softmax source beside fine-tuned model, with pictures."""

import t5lib
from t5lib.report import explanation_plots, plots
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("explain", "data")


def run(target: Target) -> dict[str, float]:
    """Write explanation.json and the pictures; every layer's numbers become curves over the layers."""
    config, stage = target.section(), target.stage
    softmax, converted = target.load("source"), target.load("finetune")
    batch = target.some_batch("val", config.images, config.seed)
    limits = {"map_images": config.map_images, "queries": config.queries, "probes": config.probes}
    explanation = t5lib.explain(softmax, converted, batch, **limits)
    stage.write_json("explanation.json", explanation.as_dict())
    figures = explanation_plots.all_pictures(explanation.as_dict(), target.pictures(batch))
    for name, figure in figures.items():
        plots.save(figure, stage.out / f"{name}.png")
        stage.artifact(stage.out / f"{name}.png")
    for number, values in enumerate(explanation.by_layer()):
        stage.log(values, step=number)
    return explanation.summary() | {"images": explanation.images}


if __name__ == "__main__":
    main(run)
