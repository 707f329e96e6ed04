"""`t5 inspect`: what is in a folder written by t5lib.save."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import t5lib
from t5lib.benchmarks.resolution_sweep import count_flops
from t5lib.checkpoint import read_description
from t5lib.cli.models import timm_adapter
from t5lib.cli.screen import facts, notes, ranges
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.families.base import Adapter
from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error

SHOWN = {"inner": "inner model", "inner_loss": "loss", "key_norm": "key norm", "locality": "locality"}
FACTORS = (1, 2, 4)  # by which the image's sides are multiplied to find where both models cost the same


def run(folder: Path) -> dict[str, Any]:
    """Everything about the model in `folder`, JSON-ready; see `_flops` for its FLOPs.

    Raises:
        T5Error: `folder` is not a saved model, or its parts do not fit each other.
    """
    with notes.status(f"reading {folder}"):
        description = read_description(folder)
        family = timm_adapter(description, folder)
        model = t5lib.load(folder)
        config, attentions = getattr(model, "t5_config", None), family.attention_names(model)
        converted = ttt_layers(model)
        new = sum(parameter.numel() for parameter in new_parameters(model).values())
        total = sum(parameter.numel() for parameter in model.parameters())
        return {
            "architecture": description["architecture"],
            "num_classes": model.num_classes,
            "image_size": list(model.patch_embed.img_size),
            "patch_size": model.patch_embed.feat_ratio(),
            "grid": list(model.patch_embed.grid_size),
            "prefix_tokens": model.num_prefix_tokens,
            "tokens": model.patch_embed.num_patches + model.num_prefix_tokens,
            "t5": to_dict(config) if config else None,
            "layers": {
                "ttt": [index for index, name in enumerate(attentions) if name in converted],
                "softmax": [index for index, name in enumerate(attentions) if name not in converted],
            },
            "kinds": kinds_of(attentions, converted),
            "parameters": {"total": total, "inherited": total - new, "new": new},
            "file_bytes": (folder / "model.safetensors").stat().st_size,
            "dtype": " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in model.parameters()})),
            "flops": _flops(family, description, config or TTTConfig()),
            "versions": description.get("versions"),
        }


def show(found: dict[str, Any]) -> None:
    """Print what `run` found."""
    height, width = found["image_size"]
    rows, columns = found["grid"]
    prefix = f" and {found['prefix_tokens']} prefix" if found["prefix_tokens"] else ""
    head = f"{found['num_classes']} classes" if found["num_classes"] else "no head"
    lines = [
        ("model", f"{found['architecture']}, {head}"),
        ("attention", attention_counts(**found["layers"])),
        ("images", f"{height} × {width} px = {rows} × {columns} patches of {found['patch_size']} px"),
        ("tokens", f"{found['tokens']}: {rows * columns} patches{prefix}"),
        ("parameters", parameter_counts(**found["parameters"])),
        ("file", f"{found['file_bytes'] / 1e6:,.1f} MB, {found['dtype']}"),
        ("cost", _cost(found["flops"]["softmax"], found["flops"]["t5"], converted=found["t5"] is not None)),
    ]
    for kind in reversed(found["kinds"]):
        where = f"layers {ranges(kind['layers'])}" if len(found["kinds"]) > 1 else "new layers"
        lines.insert(2, (where, ", ".join(f"{shown} {kind[name]}" for name, shown in SHOWN.items())))
    if found["flops"]["equal_tokens"]:
        lines.append(("equal cost", _equal(found)))
    facts(lines)


def kinds_of(attentions: list[str], converted: dict[str, TTTLayer]) -> list[dict[str, Any]]:
    """What the new layers are: one entry for all layers with the same settings."""
    kinds: dict[TTTConfig, list[int]] = {}
    for index, name in enumerate(attentions):
        if name in converted:
            kinds.setdefault(converted[name].mixer.config, []).append(index)
    names = (*SHOWN, "text")
    return [{"layers": layers, **{n: getattr(config, n) for n in names}} for config, layers in kinds.items()]


def _flops(family: Adapter, description: dict[str, Any], config: TTTConfig) -> dict[str, int | None]:
    """FLOPs of one image of the model's own size (one multiply-add counts as 2), as softmax model and with TTT layers.

    `equal_tokens` is where both cost the same. Every part of either cost is a polynomial of degree 2 at most in the
    number of patches, so three sizes tell the difference at every size exactly.
    """
    architecture, arguments = description["architecture"], description["model_args"] | {"dynamic_img_size": True}
    with torch.device("meta"):
        softmax = family.build(architecture, arguments, None)
        try:
            t5 = t5lib.convert(softmax, config)
        except T5Error:  # a softmax model can be saved without being convertible
            t5 = None
        counts = {"softmax": _counts(family, softmax), "t5": t5 and _counts(family, t5)}
    if t5 is None:
        return {"softmax": counts["softmax"][0], "t5": None, "equal_tokens": None}
    patches = [softmax.patch_embed.num_patches * factor**2 for factor in FACTORS]
    difference = np.subtract(counts["softmax"], counts["t5"])
    roots = np.roots(np.polyfit(patches, difference, 2))
    crossed = [math.ceil(round(root.real, 6)) for root in roots if np.isreal(root) and root.real > 0]
    equal = max(crossed) + softmax.num_prefix_tokens if crossed else None
    return {"softmax": counts["softmax"][0], "t5": counts["t5"][0], "equal_tokens": equal}


def _counts(family: Adapter, model: torch.nn.Module) -> list[int]:
    height, width = model.patch_embed.img_size
    images = (torch.zeros(1, model.in_chans, factor * height, factor * width) for factor in FACTORS)
    return [count_flops(model, family.inputs(each)) for each in images]


def attention_counts(ttt: list[int], softmax: list[int]) -> str:
    """Which attentions are of which kind, in words."""
    parts = [f"{name} in layers {ranges(layers)}" for name, layers in (("TTT", ttt), ("softmax", softmax)) if layers]
    return f"{', '.join(parts)} ({len(ttt)} of {len(ttt) + len(softmax)} converted)"


def parameter_counts(total: int, inherited: int, new: int) -> str:
    """How many numbers, and how many of them are new, in words."""
    return f"{total:,} = {inherited:,} inherited + {new:,} new ({100 * new / total:.1f}%)" if new else f"{total:,}"


def _cost(softmax: int, t5: int | None, *, converted: bool) -> str:
    if t5 is None:
        return f"{softmax / 1e9:.3g} GFLOPs an image; this model cannot be converted"
    share = 100 * (t5 / softmax - 1)
    difference = f"{abs(share):.0f}% {'more' if share > 0 else 'less'}"
    if converted:
        return f"{t5 / 1e9:.3g} GFLOPs an image, {difference} than its softmax twin ({softmax / 1e9:.3g})"
    return f"{softmax / 1e9:.3g} GFLOPs an image; converted {t5 / 1e9:.3g} ({difference})"


def _equal(found: dict[str, Any]) -> str:
    tokens = found["flops"]["equal_tokens"]
    side = round(math.sqrt(tokens - found["prefix_tokens"]) * found["patch_size"])
    return f"{tokens:,} tokens (a square of {side} px); with more, TTT layers take fewer FLOPs than softmax"
