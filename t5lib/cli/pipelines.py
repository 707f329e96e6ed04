"""`t5 inspect`, `t5 convert` and `t5 diagnose` on the folder of a diffusers pipeline."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import t5lib
from t5lib.cli import diagnosing, models
from t5lib.cli.images import ImageReader
from t5lib.cli.inspecting import SHOWN, attention_counts, kinds_of, parameter_counts
from t5lib.cli.screen import console, counted, facts, notes, ranges, say
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.data.buckets import fit
from t5lib.data.encoders import ImageEncoder, TextEncoder
from t5lib.evaluation.generation import classes_of
from t5lib.families import family_of
from t5lib.families.base import check_multiple
from t5lib.families.inputs import placed
from t5lib.layers.config import TTTConfig
from t5lib.training.objectives import noised_batch, noising_of
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir, read_object, write_json


def inspect(folder: Path) -> dict[str, Any]:
    """Everything about the transformer of the pipeline in `folder`, JSON-ready.

    Raises:
        T5Error: it is of no kind that can be converted, or its weights are not all there.
    """
    with notes.status(f"reading {folder}"):
        model = t5lib.load_transformer(folder)
    names, converted = family_of(model).attention_names(model), ttt_layers(model)
    new = sum(parameter.numel() for parameter in new_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    config = getattr(model, "t5_config", None)
    return {
        "pipeline": read_object(folder / "model_index.json").get("_class_name"),
        "transformer": type(model).__name__,
        "t5": to_dict(config) if config else None,
        "layers": {
            "ttt": [index for index, name in enumerate(names) if name in converted],
            "softmax": [index for index, name in enumerate(names) if name not in converted],
        },
        "kinds": kinds_of(names, converted),
        "parameters": {"total": total, "inherited": total - new, "new": new},
        "file_bytes": sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")),
        "dtype": " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in model.parameters()})),
    }


def show(found: dict[str, Any]) -> None:
    """Print what `inspect` found."""
    rows = [
        ("pipeline", f"{found['pipeline']}, transformer {found['transformer']}"),
        ("attention", attention_counts(**found["layers"])),
    ]
    for kind in found["kinds"]:
        settings = ", ".join(f"{shown} {kind[name]}" for name, shown in (SHOWN | {"text": "text"}).items())
        rows.append((f"layers {ranges(kind['layers'])}", settings))
    rows += [
        ("parameters", parameter_counts(**found["parameters"])),
        ("files", f"{found['file_bytes'] / 1e6:,.1f} MB, {found['dtype']}"),
    ]
    facts(rows)


def diagnose(
    folder: Path, images: Sequence[Path], out: Path | None, device: str | None, size: tuple[int, int] | None
) -> None:
    """As diagnosing.run, of noised latents: each image at a level of noise drawn as in training, with the condition
    that guidance drops to (the empty caption, or no class).

    Raises:
        T5Error: it cannot be diagnosed, or `size` (pixels, height and width) does not suit it.
    """
    place = str(models.choose_device(device))
    with notes.status(f"reading {folder}"):
        pipeline = t5lib.load_pipeline(folder, torch_dtype=torch.float32)
    if not (classes_of(pipeline) or hasattr(pipeline, "text_encoder_3")):
        raise T5Error(
            f"{folder} is a {type(pipeline).__name__}, and this command encodes images for Stable Diffusion 3 and DiT "
            "alone; use t5lib.diagnose in Python, with a batch as docs/diffusion.md makes it"
        )
    transformer = pipeline.transformer
    channels = 3 if pipeline.vae is not None else transformer.config.in_channels
    encoder = ImageEncoder(
        pipeline.vae, channels=channels, patch=transformer.config.patch_size, dtype="fp32", device=place
    )
    height, width = size or (transformer.config.sample_size * encoder.multiple // transformer.config.patch_size,) * 2
    for side in (height, width):
        check_multiple(side, encoder.multiple, "what a token covers,")
    reader = ImageReader(lambda image: _pixels(image, (height, width), channels), f"{height} × {width} px")
    with notes.status(f"measuring {counted(len(images), 'image')}, and the same with random weights"):
        latents = encoder(reader.read(images))
        batch = {"latents": latents, **_unconditional(pipeline, len(latents), place)}
        inputs = noised_batch({name: value.cpu() for name, value in batch.items()}, noising_of(pipeline.scheduler), 0)
        found = t5lib.diagnose(transformer.to(place), placed(inputs, torch.device(place)))
    reader.report()
    diagnosing.show(found, f"{folder}: {counted(len(latents), 'image')}, {reader.description}, noised", True, out)


def _pixels(image: Image.Image, size: tuple[int, int], channels: int) -> Tensor:
    """(channels, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(fit(image.convert("RGB" if channels == 3 else "L"), size)))
    return pixels.view(*size, -1).permute(2, 0, 1) / 127.5 - 1


def _unconditional(pipeline: Any, count: int, device: str) -> dict[str, Tensor]:
    if classes := classes_of(pipeline):
        return {"labels": torch.full((count,), classes)}
    text = TextEncoder(pipeline, dtype="fp32", device=device)
    return {name: value.float() for name, value in text([""] * count).items()}


def convert(folder: Path, out: Path, t5: dict[str, Any], seed: int) -> None:
    """Convert the transformer of the pipeline in `folder`, and write it to `out` with the pipeline's other files.

    Raises:
        T5Error: it cannot be converted, or the pipeline cannot be read.
    """
    config = TTTConfig(**TTTConfig.expand({"seed": seed, **t5}))
    model = t5lib.convert(t5lib.load_transformer(folder), config, inplace=True)
    with atomic_dir(out) as temporary:
        shutil.copytree(folder, temporary, ignore=lambda _, names: {"transformer"} & set(names), dirs_exist_ok=True)
        model.save_pretrained(temporary / "transformer")
        kind = type(model)
        index = read_object(folder / "model_index.json") | {"transformer": [kind.__module__, kind.__name__]}
        write_json(temporary / "model_index.json", index)
    layers, numbers = model.t5_report.layers, model.t5_report.numbers
    total = len(family_of(model).attention_names(model))
    facts(
        [
            ("converted", f"{len(layers)} of {total} attentions of {folder}"),
            ("inherited", f"{numbers['inherited']:,} numbers"),
            ("new", f"{numbers['new']:,} numbers"),
            ("saved to", str(out)),
            ("load it", f"import t5lib; pipe = t5lib.load_pipeline({json.dumps(str(out))})"),
            ("look at it", f"t5 inspect {out}"),
        ]
    )
    console.print()
    say(
        "Not calibrated: the new layers are random, so what it draws is noise. Fit them to the softmax layers on "
        "latents and captions of your own: t5lib.calibrate (docs/diffusion.md), or a target (python -m flows.t5)."
    )
