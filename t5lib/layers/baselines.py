"""Other ways to linearize a pretrained attention, as mixers: same inherited projections, same training.

Each class names its source and where it departs from it. What comes before and after the mixing (key norm,
convolutions, neighborhood attention) is as TTTConfig says; the presets of t5lib/layers/config.py turn off what a
source does not have.

Shapes: B images, H heads (of all layers that the mixer stands for), N tokens, D head width, F features.
"""

import torch
from t5kernels import circular_attention, linear_attention
from t5kernels.precision import without_autocast
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.layers.config import TTTConfig
from t5lib.layers.dynamic_convolution import shifted
from t5lib.layers.grafting import GatedConvolutionMixer, SlidingWindowMixer
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import Mixer

SMALLEST_FEATURE = 1e-6  # keeps the sum that attention is divided by away from 0; representable in bf16


class FeatureMapMixer(Mixer):
    """Linear attention: softmax's exp(q·k) is replaced by φ(q)·φ(k), with features that are not negative.

    A subclass defines `features`. Like softmax attention it has a map whose rows sum to 1, only that linear cost does
    not need it; `attention_map` writes it out for distillation and pictures.
    """

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k), (B, H, N, F), for q and k (B, H, N, D), not negative, in their dtypes."""
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        return linear_attention(*self.features(q, k), v).to(q.dtype)

    def attention_map(self, q: Tensor, k: Tensor) -> Tensor:
        """How much token i takes of token j, (B, H, N, N), rows summing to 1, for q and k as `mix` gets them."""
        q, k = self.features(q, k)
        weights = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
        return weights / weights.sum(-1, keepdim=True)


class HedgehogMixer(FeatureMapMixer):
    """Learned feature maps that imitate softmax's spiky, monotonic weights.

    φ(x) = [softmax(xW), softmax(−xW)] over the width, 2·D features, with one learned D×D map a head for queries and
    another for keys, both the identity at first. Queries and keys are scaled by D^-¼ each, as softmax attention scales
    their product; the source leaves that to the learned maps.

    Source: "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (arXiv 2402.04347). The
    maps have no bias, as in LoLCATs (arXiv 2410.10254), which transfers them to language models. Departure: attention
    is bidirectional, and what the maps are fitted to is the calibration's choice (its objective "attention" is theirs).
    """

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        self.q_map, self.k_map = (nn.Parameter(torch.eye(head_dim).repeat(self.num_heads, 1, 1)) for _ in "qk")

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(q, self.q_map), self._features(k, self.k_map)

    def _features(self, x: Tensor, weight: Tensor) -> Tensor:
        mapped = (x * self.head_dim**-0.25) @ weight
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1).to(x.dtype)


class PerformerMixer(FeatureMapMixer):
    """Positive orthogonal random features, an unbiased estimate of softmax's weights without anything to learn.

    φ(x) = exp(w·x − |x|²/2) for 2·D random directions w a head, in blocks of D orthogonal ones with the lengths of
    Gaussian vectors; x are queries and keys times D^-¼. What overflows is divided out: of a query its largest feature,
    of the keys of an image and head the largest of all; both cancel in the normalized attention.

    Source: "Rethinking Attention with Performers" (arXiv 2009.14794), FAVOR+. Departures: the directions are drawn
    once (from torch's global generator, so that a conversion is repeatable) and saved with the model, not redrawn
    during training; every head has its own.
    """

    directions: Tensor

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        drawn = [torch.cat([orthogonal_directions(head_dim) for _ in "12"]) for _ in range(self.num_heads)]
        self.register_buffer("directions", torch.stack(drawn))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(q, (-1,)), self._features(k, (-2, -1))

    def _features(self, x: Tensor, shared: tuple[int, ...]) -> Tensor:
        """φ(x); `shared`: the dimensions over which one largest exponent is taken off."""
        with without_autocast(x.device):  # an error in an exponent is a factor: no half precision
            wide = x.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
            exponent = wide @ self.directions.to(wide.dtype).transpose(-2, -1)
            exponent = exponent - wide.square().sum(-1, keepdim=True) / 2
            exponent = exponent - exponent.detach().amax(shared, keepdim=True)
            return (exponent.exp() + SMALLEST_FEATURE).to(x.dtype)


class ReluLinearMixer(FeatureMapMixer):
    """ReLU linear attention, the mixing of LiT, without new weights.

    Source: "LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation" (arXiv 2501.12976). Its
    other parts are settings here: the depthwise convolution of the values is locality "dwc_v" (3×3 instead of 5×5),
    weights of all but the attention are inherited by `inherit: mlp`, and the teacher's knowledge comes by
    `train.distill`. Departures: the heads stay as inherited (the source takes fewer), and distillation is of a
    classifier's logits, not of a denoiser's noise and variance.
    """

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(q) + SMALLEST_FEATURE, F.relu(k) + SMALLEST_FEATURE


class ClearMixer(Mixer):
    """Softmax attention in circular windows of `config.radius` patches, without new weights.

    Source: "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (arXiv 2412.16112). Departure:
    class and register tokens are as its text tokens: they see every token, and every token sees them.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        suffix = grid.num_suffix_tokens  # the op has such tokens in front
        everywhere = grid.num_prefix_tokens + suffix
        q, k, v = (t.roll(suffix, dims=2) if suffix else t for t in (q, k, v))
        o = circular_attention(
            q,
            k,
            v,
            rows=grid.rows,
            columns=grid.columns,
            num_prefix_tokens=everywhere,
            radius=self.radius,
        ).to(q.dtype)
        return o.roll(-suffix, dims=2) if suffix else o


class ViT3Mixer(Mixer):
    """Test-time training with two inner models: a gated linear one, and a depthwise 3×3 convolution in one head.

    Both take one step of learning rate 1 on all tokens, down the loss −mean over tokens of ⟨f(k), v⟩/3:
    f(x) = (xW₁)⊙silu(xW₂), and f(x) = x convolved over the grid. Gradients are bounded, g/(1 + |g|), with the length
    taken over the weights of one output (a column of W₁ or W₂, the nine taps of a channel).

    Source: "ViT^3: Unlocking Test-Time Training in Vision" (arXiv 2512.01643); factor and bound as in its released
    code. Departures: there the convolution has projections of its own beside the H heads. Here q, k, v are inherited,
    so the last head of each layer has the convolution for its inner model. Prefix and suffix tokens have no place in
    the grid (the source has none): the convolution is not fitted on them, and they get the gated model there too.
    Weights start with config.init_std, or wide enough to keep the scale (there 0.02). Its positional encoding is
    locality "cpe".
    """

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        self.w1, self.w2 = self.inner_weight(), self.inner_weight()
        self.taps = nn.Parameter(torch.empty(layers, head_dim, 3, 3))
        nn.init.trunc_normal_(self.taps, std=config.init_std or 1 / 3)  # nine taps: 9**-0.5

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        own = grid.patches
        gated = self._gated(q, k, v).unflatten(1, (self.layers, -1))
        own_q, own_k, own_v = (t.unflatten(1, (self.layers, -1))[:, :, -1, own] for t in (q, k, v))
        patches = self._convolution(own_q, own_k, own_v, grid).to(gated.dtype)
        last = torch.cat([gated[:, :, -1, : own.start], patches, gated[:, :, -1, own.stop :]], dim=2)
        return torch.cat([gated[:, :, :-1], last.unsqueeze(2)], dim=2).flatten(1, 2).to(q.dtype)

    def _gated(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        value, gate = k @ self.w1, k @ self.w2
        error = v * (-1 / (3 * k.shape[2]))
        part = gate.sigmoid()
        slope = part * (1 + gate * (1 - part))  # of silu
        w1 = self.w1 - bounded(k.transpose(-2, -1) @ (error * gate * part), dim=-2)
        w2 = self.w2 - bounded(k.transpose(-2, -1) @ (error * value * slope), dim=-2)
        return (q @ w1) * F.silu(q @ w2)

    def _convolution(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Fit the convolution of each layer to its k and v, apply it to q; each (B, layers, rows·columns, D)."""
        q, k, v = (t.unflatten(2, (grid.rows, grid.columns)) for t in (q, k, v))
        error = v * (-1 / (3 * grid.rows * grid.columns))
        gradient = torch.stack([(near * error).sum((2, 3)) for near in shifted(k)], dim=-1)
        taps = (self.taps.flatten(2) - bounded(gradient, dim=-1)).to(q.dtype)
        first, *others = [near * tap[:, :, None, None] for near, tap in zip(shifted(q), taps.unbind(-1), strict=True)]
        return sum(others, first).flatten(2, 3)


BASELINE_MIXERS: dict[str, type[Mixer]] = {
    "hedgehog": HedgehogMixer,
    "performer": PerformerMixer,
    "relu_linear": ReluLinearMixer,
    "clear": ClearMixer,
    "vit3": ViT3Mixer,
    "swa": SlidingWindowMixer,
    "gated_conv": GatedConvolutionMixer,
}


def orthogonal_directions(width: int) -> Tensor:
    """`width` random orthogonal vectors (rows), uniformly turned, with the lengths of independent Gaussian vectors."""
    q, r = torch.linalg.qr(torch.randn(width, width))
    turned = q * r.diagonal().sign()  # without it the library's sign convention would show
    return turned.T * torch.randn(width, width).norm(dim=1, keepdim=True)


def bounded(gradient: Tensor, dim: int) -> Tensor:
    """`gradient` with its length along `dim` bent below 1."""
    return gradient / (1 + gradient.norm(dim=dim, keepdim=True))
