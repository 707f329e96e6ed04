"""Stage `explain` of denoisers: what conversion did to every attention."""

from dataclasses import dataclass

from t5lib.analysis.denoiser_explanation import explain_denoiser
from t5lib.report import explanation_plots, plots
from t5lib.utils import files
from t5lib.utils.errors import T5Error
from tasks.denoisers.data import LatentsConfig
from tasks.runtime.stage import Stage
from tasks.targets.denoiser import load, objective, some


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """`images`: validation images, each noised once."""

    images: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise T5Error(f"explain: images is {self.images}; expected 1 or more")


SECTIONS = {"explain": ExplainConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    """Write explanation.json and the pictures; every attention's numbers become curves over the layers."""
    config, data = stage.params(ExplainConfig), stage.params(LatentsConfig, "data")
    source, converted, shards = (stage.input(name) for name in ("source", "finetune", "shards"))
    batch = some(shards, "val", data, config.images, config.seed, "explain.images")
    found = explain_denoiser(load(source), load(converted), batch, objective=objective(source, data), seed=config.seed)
    files.write_json(stage.out / "explanation.json", found.as_dict())
    stage.artifact(stage.out / "explanation.json")
    for name, figure in explanation_plots.curves(found.as_dict()).items():
        plots.save(figure, stage.out / f"{name}.png")
        stage.artifact(stage.out / f"{name}.png")
    for number, values in enumerate(found.by_layer()):
        stage.log(values, step=number)
    return found.summary() | {"images": found.images}
