"""Models that timm makes from arguments, which may come from a file: errors in them are reported beforehand."""

import dataclasses
import difflib
from typing import Any

import timm
from torch import nn

from t5lib.utils.config import AtLeastOne, Pair, Share, WholeNumber, from_dict, settings, shown
from t5lib.utils.errors import T5Error

LOADS_WEIGHTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
Side = AtLeastOne | Pair[AtLeastOne] | None


@settings
class Sizes:
    """What must hold of those arguments of timm.create_model that are numbers; None is timm's own default."""

    img_size: Side = None
    patch_size: Side = None
    in_chans: AtLeastOne | None = None
    embed_dim: AtLeastOne | None = None
    depth: AtLeastOne | None = None
    num_heads: AtLeastOne | None = None
    num_classes: WholeNumber | None = None
    reg_tokens: WholeNumber | None = None
    drop_rate: Share | None = None
    pos_drop_rate: Share | None = None
    patch_drop_rate: Share | None = None
    proj_drop_rate: Share | None = None
    attn_drop_rate: Share | None = None
    drop_path_rate: Share | None = None


def create(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's `architecture` with random weights, where torch now makes tensors.

    Raises:
        T5Error: timm does not know it, or cannot make it with `arguments`; or one of them loads weights, from wherever.
    """
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see timm.list_models(); is this timm older than the model?"
        raise T5Error(f"timm {timm.__version__} has no architecture '{architecture}'; {hint}")
    if loading := sorted(LOADS_WEIGHTS & arguments.keys()):
        raise T5Error(f"{', '.join(loading)}: no model takes this argument, which loads weights; leave it out")
    if arguments.get("features_only"):
        raise T5Error("features_only makes timm wrap the model in another; leave it out and call forward_intermediates")
    sizes = {field.name for field in dataclasses.fields(Sizes)}
    from_dict(Sizes, {name: v for name, v in arguments.items() if name in sizes}, f"timm's {architecture}: model_args")
    try:
        model = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception as error:  # whatever timm's constructors raise on arguments that they were not made for
        reason = f"{error}".strip().partition("\n")[0]
        raise T5Error(
            f"timm's {architecture} cannot be made with {shown(arguments)}: {type(error).__name__}: {reason}; correct "
            "these model_args"
        ) from error
    if getattr(getattr(model, "patch_embed", None), "num_patches", None) == 0:
        sides = (model.patch_embed.img_size, model.patch_embed.patch_size)
        raise T5Error("img_size {} holds no patch of {}; use larger images or smaller patches".format(*sides))
    return model
