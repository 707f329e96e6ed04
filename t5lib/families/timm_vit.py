"""timm's VisionTransformer family: where its attentions are, how its tokens lie, how a model is rebuilt."""

from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from t5lib.layers.attention import TTTAttention
from t5lib.layers.attention import project as project_qkv
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

PACKAGE = "timm"


def check_convertible(model: nn.Module) -> None:
    """Raises T5Error naming what in `model` cannot be converted, and why."""
    if not isinstance(model, VisionTransformer):
        raise T5Error(
            f"{type(model).__name__} is not a timm VisionTransformer (ViT, DeiT, AugReg, DINOv2, DeiT III, SigLIP …); "
            "only that family can be converted so far"
        )
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if isinstance(attention, TTTAttention):
            raise T5Error(f"blocks.{index}.attn is converted already; call t5lib.revert first")
        if type(attention) is not Attention:
            found = type(attention).__name__ if attention is not None else type(block).__name__
            raise T5Error(
                f"blocks.{index} uses {found}; only timm's Attention can be converted (relative position bias, "
                "rotary and parallel attention have no counterpart in a TTT layer)"
            )
    if not isinstance(model.patch_drop, nn.Identity):
        raise T5Error("patch_drop_rate is set: dropped patches leave holes in the grid; build the model with 0")
    if getattr(model.patch_embed, "dynamic_feat_size", None) is None:
        raise T5Error(f"patch_embed is {type(model.patch_embed).__name__}, which does not tell its token grid")


def attention_names(model: nn.Module) -> list[str]:
    """Names of all self-attentions, in order; position i is layer i of TTTConfig.layers."""
    return [f"blocks.{index}.attn" for index in range(len(model.blocks))]


def layer_sets(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What TTTConfig.layers may name: the paper converts all."""
    everything = tuple(range(len(model.blocks)))
    return {"all": everything, "paper": everything}


def fixed_grid(model: nn.Module) -> TokenGrid | None:
    """The grid of a model that takes images of one size, None of one that takes any."""
    if not getattr(model.patch_embed, "strict_img_size", False):
        return None
    return TokenGrid(*model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens)


def make_grid(model: nn.Module) -> TokenGrid:
    """A TokenGrid that follows the size of every image `model` sees."""
    grid = TokenGrid(*model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens)
    follow_inputs(model, grid)
    return grid


def follow_inputs(model: nn.Module, grid: TokenGrid) -> RemovableHandle:
    """Let `grid` be that of every image `model` sees."""
    return model.patch_embed.register_forward_pre_hook(grid)


follow_images = follow_inputs  # the name from before there were models of other inputs


def remove_grid(model: nn.Module) -> None:
    hooks = model.patch_embed._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, TokenGrid)]:
        del hooks[key]


def new_layer(attention: Attention, config: TTTConfig, grid: TokenGrid) -> TTTAttention:
    """The TTT layer that takes the place of `attention`."""
    return TTTAttention(attention, config, grid)


def softmax_attention(layer: TTTAttention) -> Attention:
    """The timm Attention a TTTAttention stands for, with its present projections (shared)."""
    head_dim, channels = layer.head_dim, layer.qkv.in_features
    attention = Attention(channels, layer.num_heads, attn_head_dim=head_dim, device="meta")
    for name in TTTAttention.inherited:
        setattr(attention, name, getattr(layer, name))
    return attention.train(layer.training)


def reset_left_out(model: nn.Module, name: str, inherit: str) -> list[str]:
    """Give timm's random initialization to what `inherit` leaves out around the attention `name`.

    Fresh tensors take the place of the pretrained ones, which stay as they are for who shares them.

    Args:
        inherit: "all" resets nothing, "attention" the block's MLP, "mlp" the attention's projections.

    Returns:
        The full names of the parameters that were reset.
    """
    if inherit == "all":
        return []
    root = name if inherit == "mlp" else f"{name.rpartition('.')[0]}.mlp"
    part = model.get_submodule(root)
    names = [f"{root}.{parameter}" for parameter, _ in part.named_parameters()]
    place = next(part.parameters()).device
    start = place if place.type == "meta" else torch.device("cpu")  # drawn there, a conversion is repeatable anywhere
    for module in part.modules():
        for parameter, value in list(module.named_parameters(recurse=False)):
            setattr(module, parameter, nn.Parameter(torch.empty_like(value, device=start)))
    for full, module in part.named_modules(prefix=root):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        init_weights_vit_timm(module, full)
    part.to(place)
    return names


def mark(model: nn.Module, config: TTTConfig) -> None:
    model.t5_config = config


def unmark(model: nn.Module) -> None:
    del model.t5_config, model.t5_report


def watch(
    attention: Attention, inputs: dict[str, tuple[Tensor, ...]], outputs: dict[str, Tensor], name: str
) -> list[RemovableHandle]:
    """While the model runs, keep what `attention` gets and gives, under `name`.

    Args:
        inputs: gets (x,), the tokens (B, N, C).
        outputs: gets the merged heads (B, N, H·D) before norm, gate and output projection.

    Returns:
        Handles whose `remove` ends it.
    """

    def keep_input(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] = arguments[:1]

    def keep_output(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        outputs[name] = arguments[0]

    return [
        attention.register_forward_pre_hook(keep_input),
        attention.norm.register_forward_pre_hook(keep_output),
    ]


def project(attention: nn.Module, tokens: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, H, N, D), of a timm or TTT attention for tokens (x,), x (B, N, C)."""
    return project_qkv(attention, *tokens)


def projections(layer: nn.Module) -> list[nn.Module]:
    """The modules that make q, k and v of `layer`'s input."""
    return [layer.qkv, layer.q_norm, layer.k_norm]


def fresh_weights(model: VisionTransformer, seed: int) -> VisionTransformer:
    """Give `model` timm's random initialization, in place: the control for a diagnosis.

    Raises:
        T5Error: timm cannot make a model like this one.
    """
    architecture, arguments = describe(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        twin = build(architecture, arguments, None)
    try:
        model.load_state_dict(twin.state_dict())
    except RuntimeError as error:
        raise T5Error(
            f"no random control: timm's {architecture} with {arguments} is another model than this one, "
            f"which was changed after it was created: {error}"
        ) from None
    return model


def describe(model: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """timm's architecture name and the arguments that rebuild `model` (weights aside).

    Raises:
        T5Error: `model` was not made by timm.create_model.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        raise T5Error(f"this {type(model).__name__} was not made by timm.create_model; make it so, then save it")
    architecture = architecture.removeprefix("t5_").removesuffix(
        "+"
    )  # t5lib.weights.timm_registry's names: X converted
    given = getattr(model, "_model_args", {})  # what timm.create_model was told (timm 1.0.31 and later keep it)
    present = {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
    }
    return architecture, given | present


def build(architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
    """The model of `describe`, with fresh weights and, given `config`, converted."""
    from t5lib.conversion import convert

    if not timm.is_model(architecture):
        raise T5Error(f"timm {timm.__version__} knows no architecture '{architecture}'; is it older than the model?")
    model = timm.create_model(architecture, pretrained=False, **arguments)
    return convert(model, config, inplace=True) if config else model


def skeleton(architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
    """As `build`, with no weights: all on the meta device."""
    with torch.device("meta"):
        return build(architecture, arguments, config)
