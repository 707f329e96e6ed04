"""What was typed on the command line, checked before anything slow is imported or downloaded."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, refuse_inside_model

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The softmax model a command works on: a timm name, or a folder written by t5lib.save or by transformers.

    Attributes:
        name: as typed.
        weights: to load in place of timm's pretrained ones (t5lib.load_weights).
        pretrained: False for random weights.
        img_size: (height, width) in pixels, None for the model's own.
    """

    name: str
    weights: Path | None = None
    pretrained: bool = True
    img_size: tuple[int, int] | None = None

    def __post_init__(self):
        if self.folder:
            self._check_folder(self.folder)
        elif self.weights:
            self._check_weights(self.weights)

    @property
    def folder(self) -> Path | None:
        """The saved model's folder; None for a timm name."""
        path = Path(self.name).expanduser()
        return path if path.is_dir() or os.sep in self.name else None

    @property
    def of_transformers(self) -> bool:
        """Whether it is a folder that transformers wrote (save_pretrained)."""
        return bool(self.folder and "model_type" in _settings(self.folder))

    def _check_folder(self, folder: Path) -> None:
        if self.weights or not self.pretrained:
            raise T5Error(f"{self.name} is a folder with weights of its own; leave --weights and --no-pretrained out")
        if is_pipeline(folder):
            raise T5Error(
                f"{self.name} is a diffusers pipeline, which only t5 inspect, convert, diagnose and generate take; use "
                "t5lib in Python (docs/diffusion.md), or a target of params.yaml"
            )
        if self.of_transformers:
            self._check_transformers_folder(folder)
            return
        if not (folder / "t5.json").is_file():
            found = "is not a saved model: it has no t5.json" if folder.is_dir() else "does not exist"
            raise T5Error(
                f"{self.name} {found}; expected a timm name, or a folder written by t5lib.save or "
                "by transformers' save_pretrained"
            )
        description = read_json(folder / "t5.json")
        if not isinstance(description, dict):
            raise T5Error(f"{folder}/t5.json does not describe a model; save or copy the folder again")
        if description.get("t5"):
            raise T5Error(
                f"{self.name} is converted already: TTT layers are where its softmax attention was. Use the softmax "
                "model it came from, or give it back its softmax attention in Python: "
                f"t5lib.save(t5lib.revert(t5lib.load({self.name!r})), 'softmax')"
            )

    def _check_transformers_folder(self, folder: Path) -> None:
        if "t5_config" in _settings(folder):
            raise T5Error(
                f"{self.name} is converted already: TTT layers are where its softmax attention was. Use the softmax "
                "model it came from, or give it back its softmax attention in Python: t5lib.revert(model)"
            )
        if self.img_size:
            raise T5Error(f"{self.name} has an image processor that sets the size; leave --img-size out")

    def _check_weights(self, weights: Path) -> None:
        if not self.pretrained:
            raise T5Error("--weights and --no-pretrained contradict each other; leave one out")
        if not weights.exists():
            raise T5Error(f"--weights {weights} does not exist; expected a file of weights, or the folder of one")


def refuse_of_transformers(source: Source, what: str, instead: str) -> None:
    """Raises T5Error where the source is a folder of transformers, which `what` does not take; `instead` does."""
    if source.of_transformers:
        raise T5Error(f"{source.name} is a model of transformers, and {what} takes those of timm; in Python: {instead}")


def _settings(folder: Path) -> dict[str, Any]:
    """What config.json in `folder` holds, unless the model is one of t5lib.save; nothing where there is none."""
    path = folder / "config.json"
    content = read_json(path) if path.is_file() and not (folder / "t5.json").is_file() else {}
    return content if isinstance(content, dict) else {}


def is_pipeline(folder: Path | str) -> bool:
    """Whether it is the folder of a diffusers pipeline."""
    return (Path(folder).expanduser() / "model_index.json").is_file()


def check_new(folder: Path) -> None:
    """Raises T5Error unless a pipeline may be written to `folder`: nothing is there."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise T5Error(f"{folder} already holds something and is left as it is; name a new folder")
    check_writable(folder)


def refuse_for_pipelines(name: str, **options: object) -> None:
    """Raises T5Error naming the first of the options that was given."""
    if options:
        option = next(iter(options)).replace("_", "-")
        raise T5Error(f"{name} is a diffusers pipeline, for which there is no --{option}; use t5lib in Python")


def find_images(folder: Path, least: int = 1) -> list[Path]:
    """All image files under `folder`, sorted; hidden ones left out.

    Raises:
        T5Error: no such folder, or fewer than `least` images in it.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise T5Error(f"{folder} {found}; expected a folder of images")
    inside = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    images = sorted(path for path in inside if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    if len(images) < least:
        raise T5Error(
            f"{folder} holds {len(images)} images, subfolders included; expected {least} or more, with names ending "
            f"in {' '.join(IMAGE_ENDINGS)}"
        )
    return images


def spread(images: list[Path], limit: int) -> list[Path]:
    """At most `limit` of `images`, evenly over the whole list, so that every subfolder has its share."""
    count = min(limit, len(images))
    return [images[index * len(images) // count] for index in range(count)]


def check_output(folder: Path, *, force: bool) -> None:
    """Raises T5Error unless a model may be written to `folder`: nothing is there, or a model and `force`."""
    if folder.exists() and not folder.is_dir():
        raise T5Error(f"{folder} is a file; name a folder for the converted model")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "t5.json").is_file():
            raise T5Error(f"{folder} holds other things than a model and is left as it is; name a new folder")
        if not force:
            raise T5Error(f"{folder} holds a model already; replace it with --force, or name another folder")
    check_writable(folder)


def check_choice(*, images: Path | None, wanted: dict[str, float], out: Path | None, fit: dict[str, int]) -> None:
    """Raises T5Error unless the options of `t5 plan` that choose layers are images and one wanted speed, or none."""
    if not images:
        alone = [*wanted, *fit, *(["out"] if out else [])]
        if alone:
            raise T5Error(f"--{alone[0].replace('_', '-')} is for choosing layers; add --images FOLDER")
        return
    if len(wanted) != 1:
        raise T5Error("--images is for choosing layers by --speedup X or --budget-ms MS; give one of them")
    if wanted.get("speedup", 2) <= 1:
        raise T5Error(f"--speedup {wanted['speedup']:g} needs no conversion; expected more than 1, such as 1.3")
    if wanted.get("budget_ms", 1) <= 0:
        raise T5Error(f"--budget-ms {wanted['budget_ms']:g}: expected a positive number of milliseconds")


def check_writable(folder: Path) -> None:
    """Raises T5Error unless `folder` exists or can be made, not inside of a model, and files can be put there."""
    refuse_inside_model(folder)
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise T5Error(f"{folder} cannot be written: {nearest} is not a folder you can write to; name another place")


def parse_size(text: str | None, option: str = "--img-size") -> tuple[int, int] | None:
    """Image size in pixels, "224" or "224x320" (height x width), as (height, width); `option` is what was typed."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:[x×]([1-9]\d*))?", text.strip())
    if not match:
        raise T5Error(f"{option} '{text}' is not understood; expected pixels: 224, or 224x320 (height x width)")
    return int(match[1]), int(match[2] or match[1])
