"""Token mixers: what stands between the pretrained q, k, v projections and the output projection of a new layer.

A mixer holds every parameter that conversion adds. Its steps, each as T5Config says: rescale q and k, key norm,
convolution, mixing (a TTT inner model or a rival), convolved values, neighborhood attention.

Shapes: B images, H heads, N tokens, D head width. Several layers can be run as one mixer of `layers`·H heads, heads of
a layer side by side (t5lib.calibrate): nothing here mixes heads.
"""

import torch
from t5kernels import INNER_WEIGHTS, neighborhood_attention, ttt
from torch import Tensor, nn

from t5lib.errors import T5Error
from t5lib.layers.grid import TokenGrid
from t5lib.layers.key_norm import key_norm
from t5lib.layers.settings import T5Config


class Mixer(nn.Module):
    """The steps that all mixers share; a subclass adds its weights and `mix`.

    Args:
        num_heads: H of one layer.
        head_dim: D.
        layers: how many layers' heads are counted together.
    """

    def __init__(self, num_heads: int, head_dim: int, config: T5Config, layers: int = 1):
        super().__init__()
        self.num_heads, self.head_dim, self.config, self.layers = num_heads * layers, head_dim, config, layers
        channels = self.num_heads * head_dim
        if config.rescale:
            for name in ("q", "k"):
                setattr(self, f"{name}_scale", nn.Parameter(torch.ones(self.num_heads, 1, head_dim)))
                setattr(self, f"{name}_offset", nn.Parameter(torch.zeros(self.num_heads, 1, head_dim)))
        convolved = {"dwc_qk": ("q_conv", "k_conv"), "dwc_v": ("v_conv",), "cpe": ("x_conv",)}
        for name in convolved.get(config.convolution, ()):
            setattr(self, name, nn.Conv2d(channels, channels, 3, padding=1, groups=channels))

    def inner_weight(self) -> nn.Parameter:
        """A new D×D weight a head, (H, D, D)."""
        std = self.config.init_std or self.head_dim**-0.5
        weight = torch.empty(self.num_heads, self.head_dim, self.head_dim)
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)  # returns nothing while diffusers loads weights
        return nn.Parameter(weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """q, k, v: (B, H, N, D), prefix tokens, then the grid's, then suffix tokens. Returns (B, H, N, D).

        Raises:
            T5Error: the tokens do not fit the grid.
        """
        config, raw = self.config, (q, k, v)
        if config.rescale:
            q, k = q * self.q_scale + self.q_offset, k * self.k_scale + self.k_offset
        k = self._normalized(k, grid)
        if config.convolution == "dwc_qk":
            q, k = q + convolved(q, self.q_conv, grid), k + convolved(k, self.k_conv, grid)
        o = self.mix(q, k, v, grid)
        if config.convolution == "dwc_v":
            o = o + convolved(v, self.v_conv, grid)
        return self._with_neighborhood(o, *raw, grid) if config.window else o

    def prepare(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """What is done to the layer's input (B, N, C) before the projections: positional encoding by convolution."""
        if self.config.convolution != "cpe":
            return x
        return x + convolved(x.unsqueeze(1), self.x_conv, grid).squeeze(1)

    def _normalized(self, k: Tensor, grid: TokenGrid) -> Tensor:
        """Key norm over all tokens, or over the image's and the text's (suffix) apart (config.key_norm_scope)."""
        kind, eps = self.config.key_norm, self.config.key_norm_eps
        if self.config.key_norm_scope == "joint" or not grid.num_suffix_tokens:
            return key_norm(k, kind, eps)
        text = k.shape[2] - grid.num_suffix_tokens
        return torch.cat([key_norm(k[:, :, :text], kind, eps), key_norm(k[:, :, text:], kind, eps)], dim=2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """The mixing itself. q, k, v: (B, H, N, D), normalized and convolved. Returns (B, H, N, D)."""
        raise NotImplementedError

    def _with_neighborhood(self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Half `o`, half neighborhood attention of the projections as they come; only the grid has neighborhoods."""
        grid.check(o.shape[2])
        if min(grid.rows, grid.columns) < self.config.window:
            raise T5Error(
                f"locality '{self.config.locality}' looks at {self.config.window}×{self.config.window} tokens, more "
                f"than the grid of {grid.rows}×{grid.columns} holds; use larger images, '+nat3', or no neighborhood"
            )
        own = grid.patches
        q, k, v = (t[:, :, own] for t in (q, k, v))
        near = neighborhood_attention(q, k, v, rows=grid.rows, columns=grid.columns, window=self.config.window)
        mixed = 0.5 * o[:, :, own] + 0.5 * near.to(o.dtype)
        return torch.cat([o[:, :, : own.start], mixed, o[:, :, own.stop :]], dim=2)


class TTTMixer(Mixer):
    """A TTT inner model, fitted to keys and values by one gradient step and applied to the queries."""

    def __init__(self, num_heads: int, head_dim: int, config: T5Config, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        self.weight_names = [f"w{i + 1}" for i in range(INNER_WEIGHTS[config.inner])]
        for name in self.weight_names:
            setattr(self, name, self.inner_weight())

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        weights = tuple(getattr(self, name) for name in self.weight_names)
        scale = self.head_dim**-0.5 / k.shape[2]
        return ttt(q, k, v, weights, inner=self.config.inner, loss=self.config.inner_loss, scale=scale)


def make_mixer(num_heads: int, head_dim: int, config: T5Config, layers: int = 1) -> Mixer:
    """The mixer that `config.inner` names, with new weights."""
    if config.inner in INNER_WEIGHTS:
        return TTTMixer(num_heads, head_dim, config, layers)
    from t5lib.layers.rivals import RIVAL_MIXERS

    return RIVAL_MIXERS[config.inner](num_heads, head_dim, config, layers)


def convolved(x: Tensor, conv: nn.Conv2d, grid: TokenGrid) -> Tensor:
    """Depthwise convolution over the token grid, 0 elsewhere. x: (B, H, N, D), conv over H·D channels."""
    grid.check(x.shape[2])
    B, H, _, D = x.shape
    image = x[:, :, grid.patches].transpose(2, 3).reshape(B, H * D, grid.rows, grid.columns)
    mixed = conv(image).reshape(B, H, D, -1).transpose(2, 3)
    return nn.functional.pad(mixed, (0, 0, grid.num_prefix_tokens, grid.num_suffix_tokens))
