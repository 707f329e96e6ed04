"""The layer that takes the place of softmax attention: inherited projections around a TTT mixer.

Shapes: B images, N tokens, C channels, H heads, D = C / H head width.
"""

from dataclasses import dataclass

import torch
from t5kernels import INNER_LOSSES, INNER_WEIGHTS, ttt
from torch import Tensor, nn

from t5lib.config import one_of
from t5lib.errors import T5Error
from t5lib.grid import TokenGrid
from t5lib.key_norm import KEY_NORMS, key_norm

LOCALITIES = ("none", "dwc_qk")


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """What the new layers are.

    Attributes:
        inner: inner model, "swiglu" or "two_layer".
        inner_loss: "dot" (paper's text) or "residual" (released DiT variant).
        key_norm: one of KEY_NORMS; "instance" removes the key shift.
        key_norm_eps: added to the variance.
        locality: "none", or "dwc_qk": q and the normalized k each get x + depthwise 3×3 convolution over the grid.
        layers: indices of the attentions to convert, None for all.
        init_std: standard deviation of new inner weights; None means head_dim**-0.5, the best start for
            calibration (docs/results); the paper trains from 0.02.
        seed: of the new weights; a conversion is repeatable and leaves the global random state alone.
    """

    inner: str = "swiglu"
    inner_loss: str = "dot"
    key_norm: str = "instance"
    key_norm_eps: float = 1.0
    locality: str = "dwc_qk"
    layers: tuple[int, ...] | None = None
    init_std: float | None = None
    seed: int = 0

    def __post_init__(self):
        one_of(self.inner, INNER_WEIGHTS, "inner")
        one_of(self.inner_loss, INNER_LOSSES, "inner_loss")
        one_of(self.key_norm, KEY_NORMS, "key_norm")
        one_of(self.locality, LOCALITIES, "locality")
        if self.key_norm_eps <= 0:
            raise T5Error(f"key_norm_eps is {self.key_norm_eps}; expected a positive number, as in the method: 1.0")
        if self.init_std is not None and self.init_std <= 0:
            raise T5Error(f"init_std is {self.init_std}; expected a positive number, or null for head_dim**-0.5")


class TTTMixer(nn.Module):
    """Token mixing at linear cost: key norm, locality, inner model. Holds every parameter that conversion adds.

    Args:
        num_heads: H. Layers can be run as one mixer by counting their heads together (see t5lib.calibrate).
        head_dim: D.
    """

    def __init__(self, num_heads: int, head_dim: int, config: T5Config):
        super().__init__()
        self.num_heads, self.head_dim, self.config = num_heads, head_dim, config
        self.weight_names = [f"w{i + 1}" for i in range(INNER_WEIGHTS[config.inner])]
        std = config.init_std or head_dim**-0.5
        for name in self.weight_names:
            weight = torch.empty(num_heads, head_dim, head_dim)
            setattr(self, name, nn.Parameter(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)))
        if config.locality == "dwc_qk":
            channels = num_heads * head_dim
            self.q_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            self.k_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """q, k, v: (B, H, N, D), prefix tokens first. Returns (B, H, N, D).

        Raises:
            T5Error: the tokens do not fit the grid.
        """
        k = key_norm(k, self.config.key_norm, self.config.key_norm_eps)
        if self.config.locality == "dwc_qk":
            grid.check(q.shape[2])
            q, k = add_convolved(q, self.q_conv, grid), add_convolved(k, self.k_conv, grid)
        weights = tuple(getattr(self, name) for name in self.weight_names)
        scale = self.head_dim**-0.5 / k.shape[2]
        return ttt(q, k, v, weights, inner=self.config.inner, loss=self.config.inner_loss, scale=scale)


def add_convolved(x: Tensor, conv: nn.Conv2d, grid: TokenGrid) -> Tensor:
    """x + conv(x) over the token grid; prefix tokens pass through. x: (B, H, N, D), conv over H·D channels."""
    B, H, _, D = x.shape
    patches = x[:, :, grid.num_prefix_tokens :]
    image = patches.transpose(2, 3).reshape(B, H * D, grid.rows, grid.columns)
    mixed = conv(image).reshape(B, H, D, -1).transpose(2, 3)
    return torch.cat([x[:, :, : grid.num_prefix_tokens], patches + mixed], dim=2)


class TTTAttention(nn.Module):
    """Takes over the projections of a timm `Attention` and mixes tokens with a TTTMixer.

    Parameters keep their names (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`); all new ones are under `mixer`.
    The modules of `attention` are shared, not copied.

    Args:
        attention: the timm.layers.Attention to replace.
        grid: token layout, shared by all layers of a model.
    """

    inherited = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")

    def __init__(self, attention: nn.Module, config: T5Config, grid: TokenGrid):
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.grid = grid
        for name in self.inherited:
            setattr(self, name, getattr(attention, name, None))
        self.mixer = TTTMixer(self.num_heads, self.head_dim, config).to(self.qkv.weight)
        self.train(attention.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (B, N, C), prefix tokens first. Returns (B, N, C).

        Raises:
            T5Error: a mask is given (a linear layer has no map to mask), or the tokens do not fit the grid.
        """
        if attn_mask is not None or is_causal:
            raise T5Error("a TTT layer sees all tokens: attn_mask and is_causal are not supported; call without them")
        q, k, v = project(self, x)
        return self.merge(self.mixer(q, k, v, self.grid), x)

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        """Heads (B, H, N, D) to (B, N, C) through the pretrained norm, gate and output projection; x gates."""
        o = self.norm(o.transpose(1, 2).flatten(2))
        if self.gate is not None:
            o = o * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(o))


def project(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, N, C) to q, k, v, each (B, H, N, D), with the pretrained q and k norms of a timm or TTT attention."""
    heads = (3, attention.num_heads, attention.head_dim)
    q, k, v = attention.qkv(x).unflatten(-1, heads).permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(q), attention.k_norm(k), v
