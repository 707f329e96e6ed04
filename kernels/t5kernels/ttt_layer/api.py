"""`ttt_layer`: key norm, convolution of queries and keys, and `ttt`, as one op that keeps its inputs and little more.

Arguments are checked, then an implementation is chosen: "reference" is plain PyTorch and runs anywhere; "triton" runs
fused kernels, which exist for the inner models swiglu, swiglu_last and linear_proj_qk with the dot loss and the key
norms "instance" and "none", with or without RMS norms of q and k. By default the op uses them for such calls with
16-bit tokens on CUDA, except inside transforms of torch.func.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from t5kernels.choice import Candidate, choose, triton_candidate
from t5kernels.precision import as_in_autocast
from t5kernels.ttt import api as ttt_api
from t5kernels.ttt_layer import reference
from t5kernels.ttt_layer.key_norm import KEY_NORMS, KeyStatistics
from t5kernels.ttt_layer.reference import Conv, Tokens

FUSED_KEY_NORMS = ("instance", "none")
NORM_SCOPES = ("joint", "modality")
Gains = tuple[Tensor, Tensor]


class RmsNorms(NamedTuple):
    """Pretrained RMS norms of q and k, as SD3.5 has them.

    Every token is divided by the root mean square of its channels and multiplied by a gain.

    Attributes:
        image: gains of the image's q and k, (D,) each.
        text: gains of the text's q and k, where there is text.
        eps: is added to the mean square.
    """

    image: Gains
    text: Gains | None = None
    eps: float = 1e-6


class GridLike(Protocol):
    """What an op reads of a grid: rows · columns tokens that lie after `num_prefix_tokens` others; more may follow."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def num_prefix_tokens(self) -> int: ...


@dataclass(frozen=True)
class Grid:
    """Where the image's tokens lie: rows · columns of them, after `num_prefix_tokens` others; more may follow."""

    rows: int
    columns: int
    num_prefix_tokens: int = 0


@dataclass(frozen=True)
class Settings:
    """What the layer does, apart from its weights.

    Attributes:
        inner, loss: as `ttt` takes them.
        key_norm, eps: as `key_norm` takes its `kind` and `eps`.
        norm_scope: with text, "joint" takes statistics over all tokens, "modality" over image and text apart.
    """

    inner: str = "swiglu"
    loss: str = "dot"
    key_norm: str = "instance"
    eps: float = 1.0
    norm_scope: str = "joint"

    def __post_init__(self):
        if torch.compiler.is_compiling():  # every name that is looked up here would be checked in every call
            return
        ttt_api.check_names("ttt_layer", self.inner, self.loss)
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
    grid: GridLike | None = None,
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
        grid: the grid of the image's tokens (a Grid, or any object with its attributes); needed with convolutions.
        q_conv, k_conv: weight (H·D, 1, 3, 3) and bias (H·D,) of depthwise convolutions, both or neither.
        text: q, k and v (B, H, T, D) of more tokens of the same sequence, which are not convolved. The inner model is
            fitted on all N + T tokens; the kernels concatenate nothing.
        norms: RMS norms of q and k, which come before everything else.
        impl: "triton", "reference", or None for the fastest one that can do it (see above).

    Returns:
        The outputs of image and text (None without text), (B, H, N, D) and (B, H, T, D).

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot be used (with the reason).

    Source: "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772), section 3.
    """
    own = (settings.inner, settings.loss, settings.key_norm, settings.eps, settings.norm_scope)
    place = None if grid is None else (grid.rows, grid.columns, grid.num_prefix_tokens)
    return _layer(image, text, weights, q_conv, k_conv, own, place, norms and (*norms,), impl)


# torch.compile does not look into this function: it would check in every call of a compiled model every name, function
# and attribute that is read here, and a launched model waits for such checks.
@torch.compiler.allow_in_graph
def _layer(image, text, weights, q_conv, k_conv, own, place, norms, impl) -> tuple[Tensor, Tensor | None]:
    """`ttt_layer`, given nothing but tensors, numbers and names, and tuples of them."""
    settings = Settings(*own)
    grid, norms = place and Grid(*place), norms and RmsNorms(*norms)
    _check_tokens(image, text)
    ttt_api.check_weights("ttt_layer", image[0], weights, settings.inner)
    _check_conv(image[0], grid, q_conv, k_conv)
    _check_norms(image[0], text, norms)
    if choose("ttt_layer", impl, _kernels(image, text, weights, settings)) == "triton":
        return _fused(image, weights, settings, grid, q_conv, k_conv, text, norms)
    if norms:
        image = reference.rms_normalized(image, norms.image, norms.eps)
        text = text and reference.rms_normalized(text, norms.text, norms.eps)
    return reference.layer(image, text, weights, q_conv, k_conv, grid, settings)


def ttt_prepare(
    x: Tensor,
    *,
    key_norm: str = "none",
    eps: float = 1.0,
    statistics: KeyStatistics | None = None,
    conv: Conv | None = None,
    grid: GridLike | None = None,
    impl: str | None = None,
) -> Tensor:
    """Prepare queries or keys for the inner model, as `ttt_layer` does, for a part of a sequence.

    This op, `ttt_accumulate` and `ttt_apply` together compute a layer in parts, which several processes may hold.

    Args:
        x: (B, H, N, D), any part of the sequence; with a convolution, rows of the grid and the rows around them.
        key_norm, eps: as in `Settings`; "none" for queries.
        statistics: those of the keys of the whole sequence, for norms over tokens; None if `x` is the whole sequence.
        conv, grid: a depthwise convolution and the grid that `x` holds, as `ttt_layer` takes them.
        impl: "triton" (key norms "instance" with statistics, and "none"; no gradients), "reference", or None for the
            kernels on 16-bit CUDA tokens and the reference elsewhere.

    Returns:
        (B, H, N, D).

    Raises:
        ValueError: an unknown key norm, shapes that do not fit, or an `impl` that cannot be used.
    """
    Settings(key_norm=key_norm)  # knows the names
    _check_conv(x, grid, conv, conv)
    if conv is None and key_norm == "none":
        return x

    def obstacle() -> str | None:
        if key_norm not in FUSED_KEY_NORMS or (key_norm != "none" and statistics is None):
            return f"with key_norm={key_norm!r} and statistics={statistics is not None}; use 'reference'"
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in conv or ())):
            return "where gradients are wanted; use 'reference'"
        return None

    if choose("ttt_prepare", impl, triton_candidate((x,), (), obstacle)) == "reference":
        return reference.prepared(x, key_norm, eps, statistics, conv, grid)
    from t5kernels.ttt_layer import triton

    [narrow] = as_in_autocast(x)
    return triton.prepare(narrow, None if key_norm == "none" else statistics, eps, conv, grid).to(x.dtype)


def _kernels(image: Tokens, text: Tokens | None, weights: Sequence[Tensor], settings: Settings) -> Candidate:
    """The fused kernels as a candidate: they can do what those of `ttt` can, with some key norms."""
    candidate = ttt_api.kernels(settings.inner, settings.loss, (*image, *(text or ())), weights)
    if settings.key_norm in FUSED_KEY_NORMS:
        return candidate
    wrong = f"with key_norm={settings.key_norm!r}; expected one of {FUSED_KEY_NORMS}; use 'reference'"
    return candidate._replace(obstacle=lambda: wrong)


def _fused(image, weights, settings, grid, q_conv, k_conv, text, norms) -> tuple[Tensor, Tensor | None]:
    from t5kernels.ttt_layer import triton

    dtype = image[0].dtype
    norm = "none" if settings.key_norm == "none" else settings.norm_scope
    grid = grid or Grid(rows=0, columns=0)
    rms = norms or (None, None, 0.0)
    parts = as_in_autocast(*image), as_in_autocast(*(text or ()))
    o, text_o = triton.layer(*parts, weights, settings.inner, q_conv, k_conv, grid, norm, settings.eps, rms)
    return o.to(dtype), text_o.to(dtype) if text else None


def _check_tokens(image: Tokens, text: Tokens | None) -> None:
    # Shapes are compared and not put into a set: hashing a size would fix it under torch.compile and torch.export.
    q, k, v = (t.shape for t in image)
    fits = len(q) == 4 and q == k == v
    if text is not None:
        text_q, text_k, text_v = (t.shape for t in text)
        fits = fits and len(text_q) == 4 and text_q == text_k == text_v
        fits = fits and text_q[:2] == q[:2] and text_q[3] == q[3]
    if not fits:
        shapes = [tuple(t.shape) for t in (*image, *(text or ()))]
        raise ValueError(f"ttt_layer: q, k, v of image and text are {shapes}; expected (B, H, N, D), and (B, H, T, D)")


def _check_norms(q: Tensor, text: Tokens | None, norms: RmsNorms | None) -> None:
    if norms is None:
        return
    shapes = [[tuple(gain.shape) for gain in gains] for gains in (norms.image, norms.text) if gains is not None]
    if shapes != [[tuple(q.shape[3:])] * 2] * (1 if text is None else 2):
        raise ValueError(
            f"ttt_layer: norms with gains of {shapes}; expected one for q and one for k, {tuple(q.shape[3:])} each, of "
            "the image, and of the text if there is any"
        )


def _check_conv(q: Tensor, grid: GridLike | None, q_conv: Conv | None, k_conv: Conv | None) -> None:
    if q_conv is None and k_conv is None:
        return
    if q_conv is None or k_conv is None:
        raise ValueError("ttt_layer: one of q_conv and k_conv is missing; expected both or neither")
    channels = q.shape[1] * q.shape[3]
    shapes = [tuple(t.shape) for t in (*q_conv, *k_conv)]
    if shapes != [(channels, 1, 3, 3), (channels,)] * 2:
        raise ValueError(f"ttt_layer: convolutions {shapes}; expected two of {(channels, 1, 3, 3)} and {(channels,)}")
    if grid is None or grid.rows * grid.columns + grid.num_prefix_tokens > q.shape[2]:
        raise ValueError(f"ttt_layer: {grid} for {q.shape[2]} image tokens; expected a grid that they fill")
