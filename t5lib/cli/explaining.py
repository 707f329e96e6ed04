"""`t5 diagnose --converted`: what became of every layer, on a user's own images."""

from dataclasses import replace
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import t5lib
from t5lib.analysis.explanation import Explanation
from t5lib.analysis.summary_text import explanation_reading
from t5lib.checkpoint import read_description
from t5lib.cli.arguments import Source
from t5lib.cli.screen import console, counted, note, notes, say, table
from t5lib.report import explanation_plots, plots
from t5lib.utils import files
from t5lib.utils.errors import T5Error

COLUMNS = {
    "distance\nsoftmax": ("distance_softmax", 1),
    "\nT5": ("distance_converted", 1),
    "error\nlayer": ("layer_error", 3),
    "\nblock": ("block_error", 3),
    "CKA\n": ("cka", 3),
    "shift\nbefore": ("shift_before", 2),
    "\nafter": ("shift_after", 2),
    "\nfitted": ("shift_fitted", 2),
}
LEGEND = (
    "distance: mean attention distance in patches; error: share of the variance, of the layer alone and of its block\n"
    "as the models run; CKA: of the block's outputs; shift: of the keys before and after key norm, and as fitted on"
)
TOKENS_A_CHANNEL = 2  # with fewer, CKA is high whatever the models do


def matching(source: Source, outline: nn.Module, folder: Path) -> Source:
    """`source` at the image size of the converted model in `folder`, where none was asked for.

    Raises:
        T5Error: `folder` holds no converted model, or one of another architecture than `outline`.
    """
    description = read_description(folder)
    if not description["t5"]:
        raise T5Error(f"--converted {folder} holds a softmax model; expected what t5 convert made from {source.name}")
    ours, theirs = description["architecture"], outline.pretrained_cfg["architecture"]
    if ours != theirs:
        raise T5Error(f"--converted {folder} was made from {ours}, not from {theirs}; name the model it came from")
    size = description["model_args"].get("img_size")
    return source if source.img_size or not size else replace(source, img_size=tuple(size))


def run(source: Source, model: nn.Module, folder: Path, pixels: Tensor, out: Path | None) -> None:
    """Compare, print and, given `out`, write explanation.json and the pictures.

    Args:
        source: `model`'s, as typed and `matching`.
        model: the softmax model.
        folder: of the converted one.
        pixels: (B, 3, H, W), normalized as timm's configuration of the model says.
    """
    converted = t5lib.load(folder)
    if source.img_size:
        converted.set_input_size(img_size=source.img_size)
    converted.to(next(model.parameters()).device)
    with notes.status(f"comparing {source.name} and {folder}"):
        found = t5lib.explain(model, converted, pixels)
    if len(pixels) * found.grid[0] * found.grid[1] < TOKENS_A_CHANNEL * model.embed_dim:
        note(f"{counted(len(pixels), 'image')} of this size are too few for CKA, which comes out too high; use more")
    say(f"{source.name} beside {folder}, {found.grid[0]} × {found.grid[1]} patches")
    _print_layers(found)
    for sentence in explanation_reading(found.as_dict()):
        say(sentence)
    if out:
        _write(found, pixels, model, out)


def _print_layers(found: Explanation) -> None:
    rows = []
    for name, kind, values in zip(found.layers, found.kinds, found.by_layer(), strict=True):
        numbers = [f"{values[key]:.{digits}f}" if key in values else "–" for key, digits in COLUMNS.values()]
        rows.append((f"{name} (softmax)" if kind == "softmax" else name, *numbers))
    table(("layer\n", *COLUMNS), rows)
    console.print(f"[dim]{LEGEND}[/]", soft_wrap=True)
    console.print()


def _write(found: Explanation, pixels: Tensor, model: nn.Module, out: Path) -> None:
    files.write_json(out / "explanation.json", found.as_dict())
    first: Tensor = pixels[: found.map_images].to(torch.float32)
    config = resolve_model_data_config(model)
    pictures = explanation_plots.as_pictures(first, config["mean"], config["std"])
    figures = explanation_plots.all_pictures(found.as_dict(), pictures)
    for name, figure in figures.items():
        plots.save(figure, out / f"{name}.png")
    note(f"written: {out / 'explanation.json'}, and as pictures {', '.join(f'{name}.png' for name in figures)}")
