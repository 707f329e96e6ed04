"""What the families of diffusers share: a TTT layer in the place of its `Attention`, a grid that follows latents.

Shapes: B latents, N image tokens, T text tokens, C channels, H heads, D head width.
"""

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from t5kernels import RmsNorms
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error

IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class LatentGrid(TokenGrid):
    """A TokenGrid that reads the grid off every latent image, as a pre-hook of diffusers' PatchEmbed."""

    def __call__(self, patch_embed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows, self.columns = (side // patch_embed.patch_size for side in inputs[0].shape[-2:])


class DiffusersTTTAttention(TTTLayer):
    """Takes over the parts of a diffusers `Attention`, of an image alone or joint with text, and mixes with a Mixer.

    Parameters keep their names (`to_q`, `norm_q`, `add_q_proj`, `to_out`, …); all new ones are under `mixer`. The
    modules of `attention` are shared, not copied.

    Args:
        attention: to replace, as SD3 and DiT use it (check_attention).
        config: of this layer.
        grid: token layout, shared by all layers of a model.
    """

    inherited = (*IMAGE, *TEXT, "to_out", "to_add_out")

    def __init__(self, attention: Attention, config: TTTConfig, grid: TokenGrid):
        super().__init__()
        self.num_heads, self.head_dim = attention.heads, attention.to_q.out_features // attention.heads
        self.grid, self.context_pre_only = grid, attention.context_pre_only
        self.order = tuple(attention._modules)
        self.settings = {name: value for name, value in vars(attention).items() if name != "_modules"}
        for name in self.inherited:
            setattr(self, name, getattr(attention, name, None))
        self.add_mixer(config, self.to_q)
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states (B, N, C), and text (B, T, C) in a joint attention. Returns the same, or both.

        Raises:
            T5Error: a mask, text where there are no projections for it, or something else is given; the tokens do
                not fit the grid; or the new weights are on another device.
        """
        if attention_mask is not None or others:
            given = ["attention_mask"] * (attention_mask is not None) + list(others)
            raise T5Error(f"a TTT layer sees all tokens and takes nothing else; call it without {', '.join(given)}")
        if encoder_hidden_states is not None and self.add_k_proj is None:
            raise T5Error("a TTT layer in the place of self-attention sees its own tokens; call it without others")
        away = {parameter.device for parameter in self.mixer.parameters()} - {hidden_states.device}
        if away:
            raise T5Error(
                f"a TTT layer's new weights are on {away.pop()}, its input on {hidden_states.device}: offloading part "
                "by part leaves them behind; use enable_model_cpu_offload, or group offloading of whole blocks"
            )
        norms = self._norms(encoder_hidden_states is not None)
        hidden_states = self.mixer.prepare(hidden_states, self.grid)
        image, text = (
            None if x is None else _project(self, x, names[:3] if norms else names)
            for x, names in ((hidden_states, IMAGE), (encoder_hidden_states, TEXT))
        )
        o, text_o = self.mixer.joint(image, text, self.grid, **norms)
        o = self._out(_merged(o))
        if text is None:
            return o
        return o, _merged(text_o) if self.to_add_out is None else self.to_add_out(_merged(text_o))

    def _norms(self, text: bool) -> dict[str, RmsNorms]:
        """The q and k norms where the mixer does them, of image and text; nothing where modules do."""
        norms = [[getattr(self, name) for name in names[3:]] for names in (IMAGE, TEXT)[: 1 + text]]
        every = [norm for pair in norms for norm in pair]
        alike = all(type(norm) is RMSNorm and norm.eps == every[0].eps for norm in every)
        if not (alike and self.mixer.takes_norms and all(n.weight is not None and n.bias is None for n in every)):
            return {}
        return {"norms": RmsNorms(*[(q.weight, k.weight) for q, k in norms], eps=every[0].eps)}

    def _out(self, o: Tensor) -> Tensor:
        for module in self.to_out:  # projection, dropout
            o = module(o)
        return o


def check_attention(attention: nn.Module, name: str, processors: tuple[type, ...]) -> None:
    """Raises T5Error unless `attention`, called `name`, is one of diffusers' with plain softmax."""
    if isinstance(attention, TTTLayer):
        raise T5Error(f"{name} is converted already; call t5lib.revert first")
    if type(attention) is not Attention:
        raise T5Error(f"{name} is {type(attention).__name__}; only diffusers' Attention can be converted")
    if attention.fused_projections:
        raise T5Error(f"the projections of {name} are fused; call unfuse_qkv_projections() first")
    if hasattr(attention, "_hf_hook"):
        raise T5Error(f"{name} is offloaded part by part; convert first, then turn offloading on")
    if type(attention.processor) not in processors:
        expected = " or ".join(kind.__name__ for kind in processors)
        raise T5Error(
            f"{name} has the processor {type(attention.processor).__name__}, whose attention a TTT layer has no "
            f"counterpart for; expected {expected}: take adapters (IP-Adapter, PAG, …) off first"
        )


def fixed_grid(model: nn.Module) -> None:
    """None: the model takes latents of any size."""


def new_layer(attention: nn.Module, config: TTTConfig, grid: LatentGrid) -> DiffusersTTTAttention:
    """The TTT layer that takes the place of `attention`."""
    return DiffusersTTTAttention(attention, config, grid)


def mark_as(model: ModelMixin, kind: type, config: TTTConfig) -> None:
    """Make `model` one of the class `kind`, in place, whose config.json will tell its layers."""
    model.__class__ = kind
    model.register_to_config(t5_config=to_dict(config))
    model.t5_config = config


def softmax_arguments(model: ModelMixin) -> dict[str, Any]:
    """The arguments that rebuild `model` as it was before conversion, weights aside."""
    return {n: value for n, value in model.config.items() if not n.startswith("_") and n != "t5_config"}


def softmax_attention(layer: DiffusersTTTAttention) -> Attention:
    """The diffusers Attention that `layer` stands for, with its present parts (shared)."""
    attention = Attention.__new__(Attention)
    vars(attention).update(layer.settings, _modules={name: getattr(layer, name) for name in layer.order})
    return attention.train(layer.training)


def follow_inputs(model: nn.Module, grid: TokenGrid) -> RemovableHandle:
    """Let `grid` be that of every latent image `model` sees."""
    return model.pos_embed.register_forward_pre_hook(grid)


def remove_grid(model: nn.Module) -> None:
    hooks = model.pos_embed._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, TokenGrid)]:
        del hooks[key]


def reset_left_out(model: nn.Module, name: str, inherit: str) -> list[str]:
    """Give a fresh start to what `inherit` leaves out around the attention `name`.

    Fresh tensors take the place of the pretrained ones, which stay as they are for who shares them.

    Args:
        inherit: "all" resets nothing, "attention" the block's MLPs, "mlp" the attention's projections and norms.

    Returns:
        The full names of the parameters that were reset.
    """
    block = name.rpartition(".")[0]
    roots = {"all": (), "attention": (f"{block}.ff", f"{block}.ff_context"), "mlp": (name,)}[inherit]
    parts = [(root, module) for root, module in model.named_modules() if root in roots]
    for _, part in parts:
        for module in part.modules():
            _restart(module)
    return [f"{root}.{parameter}" for root, part in parts for parameter, _ in part.named_parameters()]


def _restart(module: nn.Module) -> None:
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return
    place = next(iter(own.values())).device
    start = place if place.type == "meta" else torch.device("cpu")  # drawn there, a conversion is repeatable anywhere
    for parameter, value in own.items():
        setattr(module, parameter, nn.Parameter(torch.ones_like(value, device=start)))
    if hasattr(module, "reset_parameters"):  # norms have none; they start at one
        module.reset_parameters()
    module.to(place)


def watch(
    attention: nn.Module, inputs: dict[str, tuple[Tensor, ...]], outputs: dict[str, Tensor], name: str
) -> list[RemovableHandle]:
    """While the model runs, keep what `attention` gets and gives, under `name`.

    Args:
        inputs: gets the tokens, (image (B, N, C),) or with text (B, T, C) after it.
        outputs: gets the merged heads (B, N + T, H·D) before the output projections; (B, N, H·D) where text is dropped.

    Returns:
        Handles whose `remove` ends it.
    """
    heads: dict[str, Tensor] = {}

    def keep_input(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        tokens = (*arguments, named.get("hidden_states"), named.get("encoder_hidden_states"))
        inputs[name] = tuple(part for part in tokens if part is not None)

    def keep_heads(part: str):
        def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            heads[part] = arguments[0]

        return keep

    def keep_output(*_: Any) -> None:
        parts = [heads.pop(part) for part in ("image", "text") if part in heads]
        outputs[name] = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    handles = [
        attention.register_forward_pre_hook(keep_input, with_kwargs=True),
        attention.to_out[0].register_forward_pre_hook(keep_heads("image")),
        attention.register_forward_hook(keep_output),
    ]
    if attention.to_add_out is not None:
        handles.append(attention.to_add_out.register_forward_pre_hook(keep_heads("text")))
    return handles


def project(attention: nn.Module, tokens: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, H, N + T, D), image tokens first, with the pretrained q and k norms.

    Args:
        attention: a diffusers Attention or a DiffusersTTTAttention.
        tokens: (image (B, N, C),), or with text (B, T, C) after it.
    """
    image = _project(attention, tokens[0], IMAGE)
    if len(tokens) == 1:
        return image
    text = _project(attention, tokens[1], TEXT)
    return tuple(torch.cat(both, dim=2) for both in zip(image, text, strict=True))


def _merged(o: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H·D)."""
    return o.transpose(1, 2).flatten(2)


def _project(attention: nn.Module, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`names`: of the projections, and of the norms unless those come later."""
    to_q, to_k, to_v, *norms = (getattr(attention, name) for name in names)
    norm_q, norm_k = norms or (None, None)
    heads = getattr(attention, "heads", None) or attention.num_heads
    q, k, v = (to(x).unflatten(-1, (heads, -1)).transpose(1, 2) for to in (to_q, to_k, to_v))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def projections(layer: nn.Module) -> list[nn.Module]:
    """The modules that make q, k and v of `layer`'s input."""
    parts = (getattr(layer, name) for name in (*IMAGE, *TEXT))
    return [part for part in parts if part is not None]
