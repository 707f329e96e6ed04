"""The method's own mixer: an inner model that learns from keys and values and is asked by queries.

Shapes: B images, H heads, N image tokens, T text tokens, D head width.
"""

from t5kernels import (
    INNER_WEIGHTS,
    OVER_TOKENS,
    KeyStatistics,
    RmsNorms,
    Settings,
    ttt_accumulate,
    ttt_apply,
    ttt_layer,
    ttt_prepare,
)
from torch import Tensor

from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import Mixer, Tokens
from t5lib.layers.split import RowsOfGrid

Conv = tuple[Tensor, Tensor]


class TTTMixer(Mixer):
    """A TTT inner model, fitted to keys and values by one gradient step and applied to the queries."""

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        # Each of the others wants normalized q and k itself.
        self.takes_norms = not config.rescale and not config.window and config.text == "linear"
        self.inner, self.inner_loss, self.num_weights = config.inner, config.inner_loss, INNER_WEIGHTS[config.inner]
        for index in range(self.num_weights):
            setattr(self, f"w{index + 1}", self.inner_weight())

    def weights(self) -> tuple[Tensor, ...]:
        """The inner weights, each (H, D, D)."""
        return tuple(getattr(self, f"w{index + 1}") for index in range(self.num_weights))

    def settings(self) -> Settings:
        """What the layer's op does, apart from its weights."""
        return Settings(
            inner=self.inner,
            loss=self.inner_loss,
            key_norm=self.key_norm,
            eps=self.key_norm_eps,
            norm_scope=self.key_norm_scope,
        )

    def attend(
        self, image: Tokens, text: Tokens | None, grid: TokenGrid, norms: RmsNorms | None = None
    ) -> tuple[Tensor, Tensor | None]:
        image = (*self.rescaled(*image[:2]), image[2])
        text = (*self.rescaled(*text[:2]), text[2]) if text else None
        weights = self.weights()
        if isinstance(grid, RowsOfGrid):
            return self._attend_together(image, text, grid, weights)
        q_conv, k_conv = self._convolutions()
        own = self.settings()
        return ttt_layer(image, weights, own, grid=grid, q_conv=q_conv, k_conv=k_conv, text=text, norms=norms)

    def _convolutions(self) -> tuple[Conv | None, Conv | None]:
        """Weight and bias of the convolutions of q and of k, if there are any."""
        if self.convolution != "dwc_qk":
            return None, None
        return (self.q_conv.weight, self.q_conv.bias), (self.k_conv.weight, self.k_conv.bias)

    def _attend_together(
        self, image: Tokens, text: Tokens | None, grid: RowsOfGrid, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` for a process that has some rows of the image; the text is the same in all, and is counted once."""
        own = self.settings()
        q, k, v = image
        of_image, of_text = self._statistics(k, text, grid)

        q_conv, k_conv = self._convolutions()

        def prepared(q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
            k = ttt_prepare(k, key_norm=own.key_norm, eps=own.eps, statistics=of_image, conv=k_conv, grid=grid)
            return ttt_prepare(q, conv=q_conv, grid=grid), k

        q, k = grid.with_neighbors(prepared, q, k, window=3) if q_conv else prepared(q, k, grid)
        tokens = grid.total * grid.columns + (text[0].shape[2] if text else 0)
        fit = {"inner": own.inner, "loss": own.loss, "scale": self.head_dim**-0.5 / tokens}
        step = grid.summed(ttt_accumulate(k, v, weights, **fit))
        if text is None:
            return ttt_apply(q, weights, step, inner=own.inner), None
        text_q, text_k, text_v = text
        text_k = ttt_prepare(text_k, key_norm=own.key_norm, eps=own.eps, statistics=of_text)
        step = step + ttt_accumulate(text_k, text_v, weights, **fit)
        return ttt_apply(q, weights, step, inner=own.inner), ttt_apply(text_q, weights, step, inner=own.inner)

    def _statistics(
        self, k: Tensor, text: Tokens | None, grid: RowsOfGrid
    ) -> tuple[KeyStatistics | None, KeyStatistics | None]:
        """The statistics that normalize the keys of image and text; None if the norm treats each token by itself."""
        if self.key_norm not in OVER_TOKENS:
            return None, None
        of_image = grid.statistics(k)
        if text is None:
            return of_image, None
        of_text = KeyStatistics.of(text[1])
        if self.key_norm_scope == "modality":
            return of_image, of_text
        both = KeyStatistics.merged([of_image, of_text])
        return both, both
