"""What building a classifier needs of a machine, from its settings and its model without weights."""

from pathlib import Path
from typing import Any

from torch import nn

from t5lib.report.models import MODELS
from tasks.runtime.needs import Memory, Needs, Remote, Room, Work
from tasks.targets import training_needs
from tasks.targets.image_count import counted, remote_images

SINGLE = 4  # bytes of a number


def needs(sections: dict[str, Any], model: nn.Module, root: Path, target: str, pieces: int) -> Needs:
    """See Target. `model`: the softmax model on the meta device."""
    made = {stage.stem for stage in root.glob(f"data/out/{target}/*.json")}
    size = _size(model)
    left = sum(each.made_by not in made for each in MODELS)
    trained = {"freeze": sections["freeze"].train, "finetune": sections["finetune"]}
    checkpoints = max(training_needs.checkpoint_bytes(size, recipe) for recipe in trained.values())
    rooms = (
        Room("models", size.saved * left, out=True, why=f"{left} of {size.saved / 1e6:.0f} MB"),
        Room("checkpoints", checkpoints, why="at the most, while it trains"),
    )
    source = sections["fetch"].source
    remotes = [] if "fetch" in made or not source.startswith("hf:") else [Remote("the model", source)]
    remotes += remote_images(sections["shards"], root, target)
    return Needs(
        tuple(remotes),
        rooms,
        tuple(_memories(sections, model, size, pieces)),
        tuple(_works(sections, model, root, made)),
    )


def _size(model: nn.Module) -> training_needs.Size:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return training_needs.Size(SINGLE * parameters, parameters)


def _tokens(sections: dict[str, Any], model: Any) -> int:
    size = sections["data"].img_size
    height, width = size if isinstance(size, tuple) else (size, size)
    rows, columns = model.patch_embed.patch_size
    return (height // rows) * (width // columns) + model.num_prefix_tokens


def _numbers(sections: dict[str, Any], model: Any, images: int) -> int:
    return images * _tokens(sections, model) * model.embed_dim


def _memories(sections: dict[str, Any], model: Any, size: training_needs.Size, pieces: int) -> list[Memory]:
    blocks, calibrate, found = len(model.blocks), sections["calibrate"], []

    def numbers(images: int) -> int:
        return _numbers(sections, model, images)

    if calibrate.steps:
        likely = 2 * size.saved + training_needs.fitting_bytes(calibrate, blocks, numbers)
        found.append(Memory("calibrate", 2 * size.saved, likely))
    recipes = {"align": sections["align"]} if sections["align"].steps else {}
    recipes |= {"freeze": sections["freeze"].train, "finetune": sections["finetune"]}
    for stage, recipe in recipes.items():
        teacher = stage == "align" or bool(getattr(recipe, "distill", 0))
        found.append(training_needs.memory(stage, size, recipe, blocks, numbers, teacher=teacher, pieces=pieces))
    return found


def _works(sections: dict[str, Any], model: Any, root: Path, made: set[str]) -> list[Work]:
    tokens, blocks = _tokens(sections, model), len(model.blocks)
    forward = 2 * _size(model).parameters * tokens + 4 * tokens**2 * model.embed_dim * blocks
    count, calibrate, align = (
        counted(sections["shards"], "train", root).count,
        sections["calibrate"],
        sections["align"],
    )

    def epochs(recipe: Any) -> float | None:
        return None if count is None else 3.0 * forward * count * recipe.epochs

    fitted = calibrate.steps * _numbers(sections, model, calibrate.batch_size) * blocks
    works = [
        Work("calibrate", "fit compiled" if calibrate.compile else "fit", float(fitted)),
        Work("align", "train images", 4.0 * forward * align.steps * align.batch_size * align.accumulate),
        Work("freeze", "train images", epochs(sections["freeze"].train)),
        Work("finetune", "train images", epochs(sections["finetune"])),
        Work("control", "train images", epochs(sections["finetune"])),
    ]
    return [work for work in works if work.amount != 0 and work.stage not in made]
