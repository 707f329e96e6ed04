"""`ttt_layer`: key norm, convolution of queries and keys, and `ttt`, as one op that keeps its inputs and little more.

"reference" is plain PyTorch and runs anywhere; "triton" are fused kernels (swiglu with the dot loss, key norm
"instance" or "none", RMS norms of q and k). Without a wish the op picks "triton" where it is what the kernels are made
for: 16-bit tokens on CUDA, outside of torch.func. A wish that cannot be met is an error.
"""

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from t5kernels.precision import autocast_dtype
from t5kernels.transforms import transformed
from t5kernels.ttt.api import IMPLS
from t5kernels.ttt_layer import reference
from t5kernels.ttt_layer.key_norm import KEY_NORMS

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NORM_SCOPES = ("joint", "modality")
Tokens = tuple[Tensor, Tensor, Tensor]
Conv = tuple[Tensor, Tensor]
Gains = tuple[Tensor, Tensor]


class RmsNorms(NamedTuple):
    """Pretrained RMS norms of q and k, as SD3.5 has them: every token is divided by the root mean square (of `eps` more
    than its square) of its D channels, and multiplied by a gain.

    Attributes:
        image: gains of q and of k, (D,) each.
        text: likewise, where there is text.
    """

    image: Gains
    text: Gains | None = None
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the image's tokens lie: after `num_prefix_tokens` others, rows · columns of them; more may follow."""

    rows: int
    columns: int
    num_prefix_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the layer does, apart from its weights.

    Attributes:
        inner, loss: as `ttt` takes them.
        key_norm, eps: as key_norm takes them.
        norm_scope: with text, "joint" takes statistics over all tokens, "modality" of image and text apart.
    """

    inner: str = "swiglu"
    loss: str = "dot"
    key_norm: str = "instance"
    eps: float = 1.0
    norm_scope: str = "joint"

    def __post_init__(self):
        if self.key_norm not in KEY_NORMS or self.norm_scope not in NORM_SCOPES:
            raise ValueError(
                f"ttt_layer: key_norm={self.key_norm!r}, norm_scope={self.norm_scope!r}; expected one of "
                f"{list(KEY_NORMS)} and one of {NORM_SCOPES}"
            )


def ttt_layer(
    image: Tokens,
    weights: tuple[Tensor, ...],
    settings: Settings,
    *,
    grid: Grid | None = None,
    q_conv: Conv | None = None,
    k_conv: Conv | None = None,
    text: Tokens | None = None,
    norms: RmsNorms | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One TTT layer between the projections: normalize keys, convolve q and k, fit the inner model, apply it.

    Args:
        image: q, k and v, each (B, H, N, D), views of any strides.
        weights: inner weights, each (H, D, D), as many as t5kernels.INNER_WEIGHTS says.
        grid: of the image's tokens (a Grid, or what has its attributes); needed with convolutions.
        q_conv, k_conv: weight (H·D, 1, 3, 3) and bias (H·D,) of depthwise convolutions, both or neither.
        text: q, k and v (B, H, T, D) of more tokens of the same sequence, which are not convolved. The inner model is
            fitted on all N + T tokens; nothing is concatenated by the kernels.
        norms: of q and k, which come before everything else.
        impl: one of IMPLS, or None: see above.

    Returns:
        The outputs of image and text (None without text), (B, H, N, D) and (B, H, T, D).

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot be used (with the reason).

    Source: "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772), section 3.
    """
    _check_tokens(image, text)
    _check_conv(image[0], grid, q_conv, k_conv)
    _check_norms(image[0], text, norms)
    impl = _choose(image[0], settings, impl)
    tokens = image[0].shape[2] + (text[0].shape[2] if text else 0)
    scale = image[0].shape[3] ** -0.5 / tokens
    if impl == "triton":
        return _fused(image, weights, settings, grid, q_conv, k_conv, text, norms, scale)
    if norms:
        image = reference.rms_normalized(image, norms.image, norms.eps)
        text = text and reference.rms_normalized(text, norms.text, norms.eps)
    return reference.layer(image, text, weights, q_conv, k_conv, grid, settings, scale)


def _fused(image, weights, settings, grid, q_conv, k_conv, text, norms, scale) -> tuple[Tensor, Tensor | None]:
    unfit = _unfit(settings)
    if unfit:
        raise ValueError(f"ttt_layer: impl='triton' {unfit}; use 'reference'")
    from t5kernels.ttt.triton import check
    from t5kernels.ttt_layer import triton

    dtype = image[0].dtype
    image, text = ([t.to(autocast_dtype(t)) for t in part or ()] for part in (image, text))
    check("ttt_layer", [*image, *text], weights)
    norm = "none" if settings.key_norm == "none" else settings.norm_scope
    grid = grid or Grid(rows=0, columns=0)
    rms = norms or (None, None, 0.0)
    o, text_o = triton.layer(image, text, weights, q_conv, k_conv, grid, norm, settings.eps, scale, rms)
    return o.to(dtype), text_o.to(dtype) if text else None


def _choose(q: Tensor, settings: Settings, impl: str | None) -> str:
    if impl not in (None, *IMPLS):
        raise ValueError(f"ttt_layer: impl is {impl!r}; expected one of {IMPLS}, or None to choose by device")
    half = autocast_dtype(q) in (torch.float16, torch.bfloat16)
    fused = q.is_cuda and half and q.shape[3] <= 128 and not _unfit(settings) and not transformed()
    return impl or ("triton" if fused and _supported(q.device) else "reference")


def _supported(device: torch.device) -> bool:
    """Whether Triton compiles for this card. While torch.compile looks on it is taken for granted."""
    return torch.compiler.is_compiling() or torch.cuda.get_device_properties(device).major >= 8


def _unfit(settings: Settings) -> str | None:
    """Why the kernels cannot do it, None if they can."""
    if (settings.inner, settings.loss) != ("swiglu", "dot") or settings.key_norm not in ("instance", "none"):
        return (
            f"with inner={settings.inner!r}, loss={settings.loss!r}, key_norm={settings.key_norm!r}; expected "
            "'swiglu', 'dot' and 'instance' or 'none'"
        )
    return None if TRITON_INSTALLED else "without Triton, which is not installed"


def _check_tokens(image: Tokens, text: Tokens | None) -> None:
    shapes = [tuple(t.shape) for t in (*image, *(text or ()))]
    fits = all(len(shape) == 4 for shape in shapes) and len(set(shapes[:3])) == 1 and len(set(shapes[3:])) <= 1
    if not fits or (text and (shapes[0][:2], shapes[0][3]) != (shapes[3][:2], shapes[3][3])):
        raise ValueError(f"ttt_layer: q, k, v of image and text are {shapes}; expected (B, H, N, D), and (B, H, T, D)")


def _check_norms(q: Tensor, text: Tokens | None, norms: RmsNorms | None) -> None:
    if norms is None:
        return
    shapes = [[tuple(gain.shape) for gain in part] for part in norms[:2] if part is not None]
    if shapes != [[q.shape[3:]] * 2] * (1 if text is None else 2):
        raise ValueError(
            f"ttt_layer: norms with gains of {shapes}; expected one for q and one for k, {tuple(q.shape[3:])} each, of "
            "the image, and of the text if there is any"
        )


def _check_conv(q: Tensor, grid: Grid | None, q_conv: Conv | None, k_conv: Conv | None) -> None:
    if (q_conv is None) != (k_conv is None):
        raise ValueError("ttt_layer: one of q_conv and k_conv is missing; expected both or neither")
    if q_conv is None:
        return
    channels = q.shape[1] * q.shape[3]
    got = [tuple(t.shape) for t in (*q_conv, *k_conv)]
    if got != [(channels, 1, 3, 3), (channels,)] * 2:
        raise ValueError(f"ttt_layer: convolutions of {got}; expected twice {(channels, 1, 3, 3)} and {(channels,)}")
    held = grid and grid.rows * grid.columns + grid.num_prefix_tokens
    if held is None or held > q.shape[2]:
        raise ValueError(f"ttt_layer: {grid} for {q.shape[2]} image tokens; expected a grid that they fill")
