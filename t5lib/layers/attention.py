"""The layer that takes the place of softmax attention: inherited projections around a mixer.

Shapes: B images, N tokens, C channels, H heads, D head width.
"""

import torch
from torch import Tensor, nn

from t5lib.layers.config import TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid, current_grid
from t5lib.layers.mixers import Mixer
from t5lib.layers.rotary import rotated
from t5lib.layers.split import Split
from t5lib.utils.config import shown
from t5lib.utils.errors import T5Error


class TTTLayer(nn.Module):
    """What the converted layers of all families have in common: inherited parts around a mixer.

    A family's own subclass takes over the parts of a softmax attention under their names, the very modules, and adds a
    mixer (`add_mixer`). Its forward is called, and returns, as the attention did. It takes `grid=None` besides and does

        grid = self.grid(grid)
        q, k, v = its projections of self.mixer.prepare(x, grid)
        the inherited output projection of self.mixer(q, k, v, grid)

    Attributes:
        inherited: names of the parts taken over from the softmax attention (None where it has none).
        num_heads, head_dim: of the layer.
        num_prefix_tokens: class and register tokens of the model, which come before the grid's.
        mixer: holds every new parameter.
        split: how several processes share an image, each calling the layer with its own rows; None if a process has
            the whole image.
    """

    inherited: tuple[str, ...]
    num_heads: int
    head_dim: int
    num_prefix_tokens: int
    mixer: Mixer
    split: Split | None = None

    def grid(self, given: TokenGrid | None) -> TokenGrid:
        """The layout of the image's tokens in this call: `given`, or that of the running forward; if the
        image is split, this process's part of it.

        Raises:
            T5Error: `given` is something else, or nothing tells the layout.
        """
        if not isinstance(given, TokenGrid | None):
            raise T5Error(f"grid is {shown(given)}; expected TokenGrid(rows, columns, num_prefix_tokens)")
        grid = given or current_grid(self.num_prefix_tokens)
        return grid if self.split is None else self.split.part(grid)

    def __prepare_scriptable__(self) -> "TTTLayer":
        """What torch.jit.script calls first."""
        raise T5Error("TorchScript cannot take a TTT layer; use torch.export or torch.compile (or revert the model)")

    def add_mixer(self, config: TTTConfig, like: nn.Linear) -> None:
        """Make the mixer, in the precision and the place of `like`, the projection of queries.

        Raises:
            T5Error: locality "cpe" convolves the layer's input as if it were heads, and their widths differ.
        """
        width = self.num_heads * self.head_dim
        if config.convolution == "cpe" and like.in_features != width:
            raise T5Error(
                f"locality 'cpe' convolves the layer's input, of {like.in_features} channels, but the heads hold "
                f"{self.num_heads} x {self.head_dim}; use 'dwc_qk' for this model"
            )
        self.mixer = make_mixer(self.num_heads, self.head_dim, config).to(like.weight)


class TTTAttention(TTTLayer):
    """Takes over the parts of a timm `Attention` and mixes tokens with a Mixer.

    Parameters keep their names (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`); all new ones are under `mixer`.
    The parts of `attention` are shared, not copied.

    Args:
        attention: the timm.layers.Attention to replace.
        config: of this layer.
        num_prefix_tokens: of the model.

    Attributes:
        softmax_class, softmax: the class of `attention` and its plain values, for who reverts it.
    """

    inherited: tuple[str, ...] = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")

    def __init__(self, attention: nn.Module, config: TTTConfig, num_prefix_tokens: int):
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, head_width(attention)
        self.num_prefix_tokens = num_prefix_tokens
        self.softmax_class = type(attention)
        own = {name: value for name, value in vars(attention).items() if name[0] != "_" and name != "training"}
        self.softmax = {name: value for name, value in own.items() if name not in self.inherited}
        share_parts(attention, self, self.inherited)
        self.add_mixer(config, self.query_projection)
        self.train(attention.training)

    @property
    def query_projection(self) -> nn.Linear:
        """What makes the queries, perhaps with keys and values beside them."""
        return self.qkv

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid: TokenGrid | None = None
    ) -> Tensor:
        """x: (B, N, C), prefix tokens first. Returns (B, N, C). `grid`: where x lies, for a call outside of a model.

        Raises:
            T5Error: a mask is given (a linear layer has no map to mask), or the tokens do not fit the grid.
        """
        return self.mixed(x, None, attn_mask, is_causal, grid)

    def mixed(
        self, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool, grid: TokenGrid | None
    ) -> Tensor:
        """`forward` with the rotary table (`t5lib.layers.rotary`), if any."""
        if attn_mask is not None or is_causal:
            raise T5Error("a TTT layer sees all tokens: attn_mask and is_causal are not supported; call without them")
        grid = self.grid(grid)
        q, k, v = project(self, self.mixer.prepare(x, grid), rope)
        return self.merge(self.mixer(q, k, v, grid), x)

    def softmax_attention(self) -> nn.Module:
        """The attention that this layer stands for, with its present parts (shared)."""
        attention = nn.Module.__new__(self.softmax_class)
        nn.Module.__init__(attention)
        for name, value in self.softmax.items():
            setattr(attention, name, value)
        share_parts(self, attention, self.inherited)
        return attention.train(self.training)

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        """Heads (B, H, N, D) to (B, N, C) through the pretrained norm, gate and output projection; x gates."""
        o = self.norm(o.transpose(1, 2).flatten(2))
        if self.gate is not None:
            o = o * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(o))


class RotaryTTTAttention(TTTAttention):
    """A TTTAttention that replaces a timm `EvaAttention` or `AttentionRope`, which takes rotary positions.

    Queries and keys are turned as they were for softmax, and everything else comes after it: key norm, convolution,
    inner model (docs/method.md). The table is an argument of every call; the layer keeps none.
    """

    inherited = ("q_bias", "k_bias", "v_bias", "qkv", "q_proj", "k_proj", "v_proj", *TTTAttention.inherited[1:])

    def __init__(self, attention: nn.Module, config: TTTConfig, num_prefix_tokens: int):
        super().__init__(attention, config, num_prefix_tokens)
        self.rotate_half = attention.rotate_half

    @property
    def query_projection(self) -> nn.Linear:
        return self.q_proj if self.qkv is None else self.qkv

    def forward(  # type: ignore[override]  # as the softmax attentions are called, which differ too
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: TokenGrid | None = None,
    ) -> Tensor:
        """See TTTAttention. `rope`: the rotary table of the patches (`t5lib.layers.rotary`), None for no rotation."""
        return self.mixed(x, rope, attn_mask, is_causal, grid)


class UnbiasedTTTAttention(TTTAttention):
    """A TTTAttention that replaces a timm attention with a bias of relative positions in its softmax map.

    A TTT layer has no such map, so the bias is left out. What makes it stays in the layer, idle, for who reverts it.
    """

    inherited = (
        *("q_bias", "k_bias", "v_bias", "qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"),
        *("rel_pos", "relative_position_bias_table", "relative_position_index"),
    )

    def forward(  # type: ignore[override]  # as the softmax attentions are called
        self,
        x: Tensor,
        shared_rel_pos: Tensor | None = None,
        grid: TokenGrid | None = None,
        *,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """See TTTAttention. A bias that layers share comes in under the name that it has in ViTs or in BEiT, and is
        left out."""
        return self.mixed(x, None, None, False, grid)

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(o.transpose(1, 2).flatten(2)))

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """What timm's BEiT calls for another image size: the idle bias follows it."""
        attention = self.softmax_attention()
        attention.set_window_size(window_size)
        share_parts(attention, self, self.inherited)
        self.softmax |= {name: getattr(attention, name) for name in self.softmax}


def head_width(attention: nn.Module) -> int:
    """Channels of a head of a timm attention, which not all of them record."""
    if hasattr(attention, "head_dim"):
        return attention.head_dim
    return attention.qkv.out_features // (3 * attention.num_heads)


def share_parts(source: nn.Module, target: nn.Module, names: tuple[str, ...]) -> None:
    """Let `target` have the modules, parameters and buffers of `source` called `names`; None where it has none."""
    for name in names:
        if source._buffers.get(name) is None:
            setattr(target, name, getattr(source, name, None))
        else:
            listed = name not in source._non_persistent_buffers_set
            target.register_buffer(name, source._buffers[name], persistent=listed)


def project(attention: nn.Module, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, N, C) to q, k, v, each (B, H, N, D), with the pretrained q and k norms of an attention of timm or ours.

    Args:
        rope: the rotary table that the attention is called with; q and k are turned by it.
    """
    q, k, v = _heads(attention, x)
    if getattr(attention, "q_norm", None) is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, attention.rotate_half
        q, k = (rotated(t, rope, prefix, half).type_as(v) for t in (q, k))
    queries_of_a_key = q.shape[1] // k.shape[1]
    if queries_of_a_key > 1:
        k, v = (t.repeat_interleave(queries_of_a_key, dim=1) for t in (k, v))
    return q, k, v


def _heads(attention: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as they are projected, with the heads that each has."""
    if attention.qkv is None:
        parts = (getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        return tuple(part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
    qkv = attention.qkv(x)
    if getattr(attention, "q_bias", None) is not None:
        qkv = qkv + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    heads = (3, attention.num_heads, -1)
    return qkv.unflatten(-1, heads).permute(2, 0, 3, 1, 4).unbind(0)
