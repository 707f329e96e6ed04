"""The method's own mixer: an inner model that learns from keys and values and is asked by queries.

Shapes: B images, H heads, N image tokens, T text tokens, D head width.
"""

import t5kernels
from t5kernels import INNER_WEIGHTS, RmsNorms, ttt_layer
from torch import Tensor

from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import Mixer, Tokens


class TTTMixer(Mixer):
    """A TTT inner model, fitted to keys and values by one gradient step and applied to the queries."""

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        self.weight_names = [f"w{i + 1}" for i in range(INNER_WEIGHTS[config.inner])]
        for name in self.weight_names:
            setattr(self, name, self.inner_weight())
        self.settings = t5kernels.Settings(
            inner=config.inner,
            loss=config.inner_loss,
            key_norm=config.key_norm,
            eps=config.key_norm_eps,
            norm_scope=config.key_norm_scope,
        )

    @property
    def takes_norms(self) -> bool:
        own = self.config  # all three want normalized q and k themselves
        return not own.rescale and not own.window and own.text == "linear"

    def attend(
        self, image: Tokens, text: Tokens | None, grid: TokenGrid, norms: RmsNorms | None = None
    ) -> tuple[Tensor, Tensor | None]:
        image = (*self.rescaled(*image[:2]), image[2])
        text = (*self.rescaled(*text[:2]), text[2]) if text else None
        weights = tuple(getattr(self, name) for name in self.weight_names)
        q_conv = k_conv = None
        if self.config.convolution == "dwc_qk":
            q_conv, k_conv = ((conv.weight, conv.bias) for conv in (self.q_conv, self.k_conv))
        return ttt_layer(image, weights, self.settings, grid=grid, q_conv=q_conv, k_conv=k_conv, text=text, norms=norms)
