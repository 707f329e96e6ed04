"""Softmax models of timm with weights of other people's files, every one of them used."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from t5lib.families.timm_creation import create
from t5lib.utils.errors import T5Error
from t5lib.weights import transformers_vit
from t5lib.weights.state_dicts import read

_log = logging.getLogger(__name__)


def load_weights(architecture: str, path: Path | str, *, which: str | None = None, **arguments: Any) -> nn.Module:
    """timm's `architecture` with the weights in `path`, in eval mode.

    Args:
        path: a .safetensors file or one of torch.save (opened without running any code in it), the index of a sharded
            checkpoint, or a folder with one of them. Names may be timm's, those of the original code where timm knows
            them, or those of transformers (ViT, DeiT, DINOv2, DINOv3, SigLIP); wrappers' prefixes are taken off.
        which: "ema" or "model", for a file that holds both; None takes the moving average where there is one.
        arguments: of timm.create_model, such as img_size, to which positions are resampled. num_classes is that of
            the weights; with another one the head is a fresh one. SigLIP of transformers has act_layer="gelu_tanh".

    Raises:
        T5Error: not such a file, an unknown architecture, or weights that do not fit it (named).
    """
    weights = in_timm_names(read(path, which)[0])
    heads = next(iter(weights["head.weight"].shape), 0) if "head.weight" in weights else 0
    own_head = "num_classes" not in arguments
    try:
        return build(weights, architecture, {"num_classes": heads} | arguments, own_head=own_head)
    except T5Error as error:
        raise T5Error(f"{path}: {error}") from None


def in_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in names that timm knows."""
    return transformers_vit.to_timm(weights) if transformers_vit.is_theirs(weights) else weights


def build(
    weights: dict[str, Tensor],
    architecture: str,
    arguments: dict[str, Any],
    seed: int = 0,
    *,
    own_head: bool = False,
) -> nn.Module:
    """The timm model with every one of `weights`, by timm's own loading, in eval mode.

    Args:
        arguments: of timm.create_model; where num_classes is not that of the weights, the head is a fresh one (normal,
            std 0.02, zero bias).
        seed: of the fresh head.
        own_head: the head must be that of the weights.

    Raises:
        T5Error: unknown architecture, arguments it does not take, or weights that do not fit it (all named).
    """
    empty = blank(architecture, arguments)
    try:
        # The same number of classes on both sides makes timm's loading strict: nothing missing, nothing left over.
        given = {"state_dict": _with_head(weights, empty, seed, own_head), "num_classes": empty.num_classes}
        model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=given, **arguments)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:600]
        raise T5Error(
            f"the weights do not fit timm's {architecture} with {arguments}: {reason}; correct architecture and "
            "arguments, or take the weights that belong to them"
        ) from error
    del model.pretrained_cfg["state_dict"]
    return model.eval()


def blank(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """The model without weights, on the meta device. Raises T5Error for an unknown architecture or argument."""
    with torch.device("meta"):
        return create(architecture, arguments)


def _with_head(weights: dict[str, Tensor], empty: nn.Module, seed: int, own: bool) -> dict[str, Tensor]:
    """`weights` with a head of the shape that `empty` has: its own if it fits, otherwise a fresh one, or none."""
    names = empty.pretrained_cfg["classifier"]
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    wanted = {name: tensor.shape for name, tensor in empty.state_dict().items() if name.startswith(heads)}
    found = {name: tensor.shape for name, tensor in weights.items() if name.startswith(heads)}
    if wanted == found:
        return weights
    if own:
        raise T5Error(
            f"the weights' head is {_shapes(found) or 'none'}, that of the model {_shapes(wanted) or 'none'}; take the "
            "architecture that belongs to it, or pass num_classes for a fresh head"
        )
    if found:
        _log.warning("the weights' head %s is replaced by a fresh one: %s", _shapes(found), _shapes(wanted) or "none")
    rng = torch.Generator().manual_seed(seed)
    fresh = {
        name: torch.randn(shape, generator=rng) * 0.02 if name.endswith("weight") else torch.zeros(shape)
        for name, shape in wanted.items()
    }
    return {name: tensor for name, tensor in weights.items() if name not in found} | fresh


def _shapes(head: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in head.items())
