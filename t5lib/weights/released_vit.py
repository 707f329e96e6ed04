"""Vision transformers in the naming of the method's released code, as models of ours, and back.

Released (ViT "T5")                          ours                               i: layer, H heads of width D
blocks.i.attn.{w1,w2,w3}        (1, H, D, D)  blocks.i.attn.mixer.{w1,w2,w3}     (H, D, D)
blocks.i.attn.{q,k}_conv2d.*                  blocks.i.attn.mixer.{q,k}_conv.*
everything else                               the same name: timm's VisionTransformer

t5lib/weights/released_dit.py has the names of the DiT ("DiT5").
Source: the code released with "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772).
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.families.timm_vit import ADAPTER, VisionTransformer
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.utils.weights import check_fit
from t5lib.weights.state_dicts import INNER, RELEASED, RELEASED_REMEDY

OURS = {ours: theirs for theirs, ours in RELEASED.items()}
ARCHITECTURES = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}


def from_released(
    weights: dict[str, Tensor], config: TTTConfig | None, source: str, img_size: tuple[int, int] | None
) -> nn.Module:
    """See t5lib.load_released. `source`: names the file in messages."""
    arguments = describe(weights, source, img_size)
    config = config or infer_config(weights, arguments["depth"], source)
    with torch.device("meta"):
        model = ADAPTER.build(ARCHITECTURES.get(arguments["embed_dim"], ARCHITECTURES[192]), arguments, config)
    weights = to_ours(weights)
    check_fit(weights, model.state_dict(), f"{source} does not fit the model it describes", RELEASED_REMEDY)
    model.load_state_dict(weights, assign=True)
    return model


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model`, a converted timm VisionTransformer, in the released naming; tensors are shared.

    Raises:
        T5Error: it holds new weights that the released code has no name for (named).
    """
    if not isinstance(model, VisionTransformer):
        raise T5Error(f"{type(model).__name__} is not a timm VisionTransformer; only its weights can be named back")
    released, unknown = {}, []
    for name, value in model.state_dict().items():
        before, mixer, new = name.partition(".attn.mixer.")
        head, dot, rest = new.partition(".")
        if mixer and head not in OURS:
            unknown.append(name)
        elif mixer:
            released[f"{before}.attn.{OURS[head]}{dot}{rest}"] = value if dot else value.unsqueeze(0)
        else:
            released[name] = value
    if unknown:
        raise T5Error(
            f"the released code has no name for {unknown[:4]}; expected TTTConfig's t5, t5+, or inner two_layer"
        )
    return released


def to_ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights from released names to ours, both described above; names that are ours already stay."""
    ours = {}
    for name, value in weights.items():
        match = re.fullmatch(rf"(blocks\.\d+\.attn)\.({'|'.join(RELEASED)})(\..+)?", name)
        if not match:
            ours[name] = value
        elif match[3]:
            ours[f"{match[1]}.mixer.{RELEASED[match[2]]}{match[3]}"] = value
        else:
            ours[f"{match[1]}.mixer.{RELEASED[match[2]]}"] = value.squeeze(0)
    return ours


def infer_config(weights: dict[str, Tensor], depth: int, source: str) -> TTTConfig:
    """The TTTConfig whose layers hold these weights: inner model and locality by names, layers by their places."""
    found = {index: _new_names(weights, index) for index in range(depth)}
    layers = [index for index, names in found.items() if names]
    first = found[layers[0]]
    different = [index for index in layers if found[index] != first]
    inner = INNER.get(tuple(sorted(first & {"w1", "w2", "w3"})))
    convolutions = first - {"w1", "w2", "w3"}
    if different or inner is None or convolutions not in (set(), {"q_conv2d", "k_conv2d"}):
        held = sorted(first) if not different else f"not the same in blocks {layers[0]} and {different[0]}"
        raise T5Error(
            f"{source}: new weights of attn are {held}; expected w1 and w2, and maybe w3, and of q_conv2d and k_conv2d "
            "both or neither, and the same in every block"
        )
    return TTTConfig(
        inner=inner,
        locality="dwc_qk" if convolutions else "none",
        layers=None if len(layers) == depth else tuple(layers),
    )


def describe(weights: dict[str, Tensor], source: str, img_size: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments of timm.create_model for the VisionTransformer that these weights are of, softmax attention aside.

    Raises:
        T5Error: not a ViT, not converted, or an image size that cannot be told.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise T5Error(f"{source} is not a released ViT: it has no {missing}; found {list(weights)[:6]}")
    inner = {name: value for name, value in weights.items() if re.fullmatch(r"blocks\.\d+\.attn\.w[123]", name)}
    if not inner:
        raise T5Error(
            f"{source} has no blocks.i.attn.w1: it holds a softmax model, or none of the released code. Load a softmax "
            "model with timm and convert it with t5lib.convert"
        )
    width, channels, *patch = weights["patch_embed.proj.weight"].shape
    head_dim = next(iter(inner.values())).shape[-1]
    heads = width // head_dim
    wrong = [f"{n} {tuple(value.shape)}" for n, value in inner.items() if value.shape != (1, heads, head_dim, head_dim)]
    if wrong or heads * head_dim != width:
        raise T5Error(f"{source}: inner weights are {wrong[:3] or head_dim}; expected (1, H, D, D) with H·D = {width}")
    has_class = "cls_token" in weights
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    tokens, prefix = weights["pos_embed"].shape[1], has_class + registers
    rows, columns, own = _grid(tokens, prefix, img_size, (patch[0], patch[1]), source)
    arguments = {
        "img_size": [rows * patch[0], columns * patch[1]],
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": weights["head.weight"].shape[0] if "head.weight" in weights else 0,
        "global_pool": "avg" if "fc_norm.weight" in weights or not has_class else "token",
        "fc_norm": "fc_norm.weight" in weights,
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "num_heads": heads,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "class_token": has_class,
        "reg_tokens": registers,
        "no_embed_class": not own,
    }
    if "blocks.0.ls1.gamma" in weights:
        arguments["init_values"] = 1e-5  # any number makes layer scales; the values come from the file
    return arguments


def _new_names(weights: dict[str, Tensor], block: int) -> set[str]:
    """Which of RELEASED the attention of `block` has."""
    start = f"blocks.{block}.attn."
    return {name[len(start) :].partition(".")[0] for name in weights if name.startswith(start)} & RELEASED.keys()


def _grid(
    positions: int, prefix: int, img_size: tuple[int, int] | None, patch: tuple[int, int], source: str
) -> tuple[int, int, bool]:
    """Rows, columns, and whether the prefix tokens have positions of their own."""
    for own in (True, False):
        patches = positions - prefix * own
        side = math.isqrt(patches)
        rows, columns = (img_size[0] // patch[0], img_size[1] // patch[1]) if img_size else (side, side)
        if rows * columns == patches:
            return rows, columns, own
    shown = f"not those of a {img_size[0]} × {img_size[1]} image" if img_size else "not those of a square image"
    raise T5Error(
        f"{source}: pos_embed has {positions} positions with {prefix} prefix tokens and patches of {patch[0]} × "
        f"{patch[1]} px, {shown}; pass the img_size=(height, width) it was trained with"
    )
