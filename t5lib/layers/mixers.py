"""Token mixers: what stands between the pretrained q, k, v projections and the output projection of a new layer.

A mixer holds every parameter that conversion adds. Its steps, each as TTTConfig says: rescale q and k, key norm,
convolution, mixing (a TTT inner model or a rival), convolved values, neighborhood attention, exact text.

Shapes: B images, H heads, N image tokens, T text tokens, D head width. Several layers can be run as one mixer of
`layers`·H heads, heads of a layer side by side (t5lib.calibrate): nothing here mixes heads.
"""

import t5kernels
import torch
from t5kernels import RmsNorms, key_norm, neighborhood_attention
from t5kernels.precision import autocast_dtype
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.layers.config import TTTConfig
from t5lib.layers.dynamic_convolution import DynamicConvolution
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

Tokens = tuple[Tensor, Tensor, Tensor]


class Mixer(nn.Module):
    """The steps that all mixers share; a subclass adds its weights, and `mix` or `attend`.

    Args:
        num_heads: H of one layer.
        head_dim: D.
        layers: how many layers' heads are counted together.

    Attributes:
        takes_norms: whether `joint` can do the pretrained RMS norms of q and k itself.
    """

    takes_norms = False

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__()
        self.num_heads, self.head_dim, self.config, self.layers = num_heads * layers, head_dim, config, layers
        # What a forward reads lies here as plain values. torch.compile sees at a glance that nothing was replaced in a
        # module; into any other object that it holds, and at every item of a list, it looks in every call.
        self.convolution, self.window, self.locality = config.convolution, config.window, config.locality
        self.key_norm, self.key_norm_eps, self.key_norm_scope = (
            config.key_norm,
            config.key_norm_eps,
            config.key_norm_scope,
        )
        self.text, self.rescale, self.radius = config.text, config.rescale, config.radius
        channels = self.num_heads * head_dim
        if config.rescale:
            for name in ("q", "k"):
                setattr(self, f"{name}_scale", nn.Parameter(torch.ones(self.num_heads, 1, head_dim)))
                setattr(self, f"{name}_offset", nn.Parameter(torch.zeros(self.num_heads, 1, head_dim)))
        convolved = {"dwc_qk": ("q_conv", "k_conv"), "dwc_v": ("v_conv",), "cpe": ("x_conv",)}
        for name in convolved.get(self.convolution, ()):
            setattr(self, name, nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
        if self.convolution == "dconv_v":
            self.v_dconv = DynamicConvolution(self.num_heads, head_dim)
        if config.text == "exact":
            self.text_weight = nn.Parameter(torch.zeros(self.num_heads, 1, 1))
        learned = bool(self.window) and config.neighborhood_share == "learned"
        share = nn.Parameter(torch.zeros(self.num_heads, 1, head_dim)) if learned else None  # a half, by its sigmoid
        self.register_parameter("near_share", share)

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
        if not grid.num_suffix_tokens:
            return self.joint((q, k, v), None, grid)[0]
        self._check(grid, q.shape[2])
        image, text = zip(*(t.tensor_split((grid.patches.stop,), dim=2) for t in (q, k, v)), strict=True)
        o, text_o = self.joint(image, text, grid.with_suffix(0))
        return o if text_o is None else torch.cat((o, text_o), dim=2)

    def joint(
        self, image: Tokens, text: Tokens | None, grid: TokenGrid, **norms: RmsNorms
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` for tokens that lie apart in memory: `grid` is the image's, text has no place in it.

        Args:
            image, text: q, k and v, each (B, H, N, D) and (B, H, T, D).
            norms: nothing, or `norms` of q and k where they are still to be done (`takes_norms`).

        Returns:
            The outputs of both, (B, H, N, D) and (B, H, T, D); None without text.

        Raises:
            T5Error: the image's tokens do not fit the grid.
        """
        if text is not None and self.text == "exact":
            return self._with_exact_text(self.joint(image, None, grid)[0], image, text, grid)
        self._check(grid, image[0].shape[2])
        o, text_o = self.attend(image, text, grid, **norms)
        if self.convolution == "dwc_v":
            o = o + convolved(image[2], self.v_conv, grid)
        elif self.convolution == "dconv_v":
            o = o + grid.with_neighbors(self.v_dconv, image[2], window=3)
        return self._with_neighborhood(o, *image, grid, self.window) if self.window else o, text_o

    def prepare(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """What is done to the layer's input (B, N, C) before the projections: positional encoding by convolution."""
        if self.convolution != "cpe":
            return x
        return x + convolved(x.unsqueeze(1), self.x_conv, grid).squeeze(1)

    def attend(self, image: Tokens, text: Tokens | None, grid: TokenGrid) -> tuple[Tensor, Tensor | None]:
        """Rescaling, key norm, convolution of q and k, and the mixing itself; takes and gives what `joint` does."""
        if text is None:
            return self.mix(*self.localized(*image[:2], grid), image[2], grid), None
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        grid = grid.with_suffix(text[0].shape[2])
        o = self.mix(*self.localized(q, k, grid), v, grid)
        o, text_o = o.tensor_split((grid.patches.stop,), dim=2)
        return o, text_o

    def localized(self, q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """q and k (B, H, N, D), with suffix tokens if the grid has them, as the mixing itself gets them."""
        q, k = self.rescaled(q, k)
        k = self.normalized(k, grid)
        if self.convolution == "dwc_qk":
            q, k = q + convolved(q, self.q_conv, grid), k + convolved(k, self.k_conv, grid)
        return q, k

    def rescaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not self.rescale:
            return q, k
        return q * self.q_scale + self.q_offset, k * self.k_scale + self.k_offset

    def normalized(self, k: Tensor, grid: TokenGrid) -> Tensor:
        """Key norm over all tokens, or over the image's and the text's (suffix) apart (config.key_norm_scope)."""
        kind, eps = self.key_norm, self.key_norm_eps
        if self.key_norm_scope == "joint" or not grid.num_suffix_tokens:
            return key_norm(k, kind, eps)
        text = k.shape[2] - grid.num_suffix_tokens
        return torch.cat([key_norm(k[:, :, :text], kind, eps), key_norm(k[:, :, text:], kind, eps)], dim=2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """The mixing itself. q, k, v: (B, H, N, D), normalized and convolved. Returns (B, H, N, D)."""
        raise NotImplementedError

    def _check(self, grid: TokenGrid, num_tokens: int) -> None:
        if self.locality != "none":
            grid.check(num_tokens)

    def _with_exact_text(self, o: Tensor, image: Tokens, text: Tokens, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """Softmax attention wherever text takes part; the cost, T·(N + T) and N·T, is linear in N.

        A part of `o`, what image tokens make of the image, gives way to softmax attention to the text. Softmax over all
        tokens would take that part by the sums of exp(q·k) over text and image; a TTT layer has no such sum. Here the
        part is T·w / (N + T·w), with w = exp(text_weight) of a head, how much a text token weighs beside one of the
        image: 1 at first, so the text has at first the part that it has of the tokens.

        Source: after the hybrid attention of MM-EDiT (arXiv 2503.16726), whose image attention is linear with a
        normalizer and so shares one with the text's.
        """
        (q, k, v), (text_q, text_k, text_v) = image, text
        k, v = grid.gathered(k, v)
        text_o = softmax_attention(text_q, torch.cat((k, text_k), dim=2), torch.cat((v, text_v), dim=2))
        of_text = softmax_attention(q, text_k, text_v).to(o.dtype)
        weight = text_k.shape[2] * self.text_weight.exp()
        return torch.lerp(o, of_text, (weight / (weight + k.shape[2])).to(o.dtype)), text_o

    def _with_neighborhood(self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, window: int) -> Tensor:
        """A part of `o` gives way to neighborhood attention of the projections as they come, on the grid alone."""
        check_window(self.locality, window, grid)

        def attention(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
            return neighborhood_attention(q, k, v, rows=grid.rows, columns=grid.columns, window=window)

        q, k, v = (grid.on_grid(t) for t in (q, k, v))
        near = grid.with_neighbors(attention, q, k, v, window=window, moves_inward=True)
        learned = self.near_share
        share = 0.5 if learned is None else torch.sigmoid(learned).to(o.dtype)
        mixed = torch.lerp(grid.on_grid(o), near.to(o.dtype), share)
        own = grid.patches
        return torch.cat([o[:, :, : own.start], mixed, o[:, :, own.stop :]], dim=2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """What queries (B, H, Q, D) make of keys and values (B, H, N, D), in q's dtype; `mask` as PyTorch's op takes it."""
    dtype = autocast_dtype(q)
    return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask).to(q.dtype)


def check_window(locality: str, window: int | None, grid: TokenGrid) -> None:
    """Raises T5Error when the neighborhood of `locality`, `window` tokens a side if there is one, exceeds `grid`."""
    whole = grid.whole
    if window and min(whole.rows, whole.columns) < window:
        raise T5Error(
            f"locality '{locality}' looks at {window}×{window} tokens, more than the grid of "
            f"{whole.rows}×{whole.columns} holds; use larger images, '+nat3', or no neighborhood"
        )


def convolved(x: Tensor, conv: nn.Conv2d, grid: TokenGrid) -> Tensor:
    """Depthwise convolution over the token grid, 0 elsewhere. x: (B, H, N, D), conv over H·D channels."""
    grid.check(x.shape[2])

    def over_grid(x: Tensor, grid: TokenGrid) -> Tensor:
        assert conv.bias is not None
        return t5kernels.convolved(x, conv.weight, conv.bias, grid)

    return grid.with_neighbors(over_grid, x, window=conv.kernel_size[0])
