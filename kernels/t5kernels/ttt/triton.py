"""Some inner models with the dot loss by the kernels of triton_kernels.py, triton_last_kernels.py and
triton_linear_kernels.py: two differentiable custom ops, the halves of `ttt`.

`accumulate` sums the step over keys and values, `apply` applies the stepped model to queries. Autograd joins their
backward passes through the step, so the backward keeps the inputs and the step only: S·D² numbers a head, where S is 3,
or 1 where W3 alone steps, and D² + D for linear_proj_qk. Results are the same from run to run: partial sums of programs
are added in a fixed order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from t5kernels.launch import ceil_div, chunks_of, contiguous, launch, like_tokens, lying_alike, sum_over_chunks
from t5kernels.linear_attention.reference import SMALLEST_NORMALIZER
from t5kernels.ops import differentiable, op
from t5kernels.ttt import triton_kernels, triton_last_kernels, triton_linear_kernels
from t5kernels.ttt.triton_tiles import tile_for


@dataclass(frozen=True, kw_only=True)
class Inner:
    """How the kernels of an inner model are called, and what they take and give.

    Attributes:
        on_keys, on_queries: the kernels of the forward; those of the backward are called the same with "_backward".
        of_keys: places of the weights on which the step depends.
        of_queries: places of those on which, beside the step, the output depends.
        steps: how many weights, the last ones, take the step; 0 where the step is the sums of normalized attention.
    """

    on_keys: str
    on_queries: str
    of_keys: tuple[int, ...]
    of_queries: tuple[int, ...]
    steps: int

    def step_shape(self, D: int) -> tuple[int, ...]:
        """That of an image's and head's step: S matrices, or the sums of features times values and those of features.

        A stepping weight's matrix is its gradient.
        """
        return (self.steps, D, D) if self.steps else (D + 1, D)

    def gradients_shape(self, D: int) -> tuple[int, ...]:
        """That of what queries give an image and head: minus the gradients of the weights, then that of the step.

        As the stepped weights are W - G, the gradient of G is a part of the former.
        """
        return (len(self.of_queries), D, D) if self.steps else (2 * D + 1, D)

    def weight_gradients(self, gradients: Tensor) -> Tensor:
        """Minus those of the weights `of_queries`, (B, H, weights, D, D), of `gradients` (B, H, *gradients_shape)."""
        return gradients if self.steps else gradients[:, :, None, : gradients.shape[3]]

    def step_gradient(self, gradients: Tensor) -> Tensor:
        """That of the step, (B, H, *step_shape)."""
        return gradients[:, :, -self.steps :] if self.steps else gradients[:, :, gradients.shape[3] :]

    def numbers(self, scale: float) -> tuple[float, ...]:
        """What kernels on queries take beside sizes: the least normalizer, in which the scale does not cancel."""
        return () if self.steps else (scale * SMALLEST_NORMALIZER,)

    @property
    def switches(self) -> tuple[bool, ...]:
        """The constant LAST of kernels on queries, if they have it."""
        return (self.steps == 1,) if self.steps else ()


INNERS = {
    "swiglu": Inner(on_keys="accumulate", on_queries="apply", of_keys=(0, 1, 2), of_queries=(0, 1, 2), steps=3),
    # With the dot loss the step does not depend on W3.
    "swiglu_last": Inner(on_keys="accumulate_last", on_queries="apply", of_keys=(0, 1), of_queries=(0, 1, 2), steps=1),
    "linear_proj_qk": Inner(
        on_keys="accumulate_linear", on_queries="apply_linear", of_keys=(1,), of_queries=(0,), steps=0
    ),
}
KERNELS = vars(triton_kernels) | vars(triton_last_kernels) | vars(triton_linear_kernels)


def accumulate(k: Tensor, v: Tensor, weights: Sequence[Tensor], scale: float, inner: str) -> Tensor:
    """The step (B, H, *step_shape) of the inner model that `inner` names on k and v (B, H, N, D), float32."""
    return _differentiable_accumulate(k, v, *three(weights), scale, inner)


def apply(q: Tensor, weights: Sequence[Tensor], step: Tensor, inner: str, scale: float = 1.0) -> Tensor:
    """The stepped inner model applied to q (B, H, N, D). step: (B, H, *step_shape); scale: that of the step, which only
    normalized attention needs."""
    return _differentiable_apply(q, *three(weights), step.float(), scale, inner)


def three(weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The weights as an op takes them, which has arguments for three."""
    return *weights, *(None,) * (3 - len(weights))


def launch_accumulate(
    tokens: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], scale: float, inner: Inner
) -> Tensor:
    """The step (B, H, *step_shape) in float32, on the keys and values of all parts of a sequence."""
    first = tokens[0][0]
    B, H, _, D = first.shape
    widths, tile, slices = tile_for(inner.on_keys, first)
    keys, values = (lying_alike(each) for each in zip(*tokens, strict=True))
    chunk, chunks, _ = chunks_of(keys, tile, B * H * slices)
    sums = first.new_empty(B * H, sum(chunks), *inner.step_shape(D), dtype=torch.float32)
    (k, text_k), (v, text_v) = ((each[0], each[-1]) for each in (keys, values))
    launch(
        *(_kernel(inner.on_keys), (B * H, sum(chunks), slices), k, tile),
        *(k, v, text_k, text_v, *_taken(weights, inner.of_keys), sums),
        *(*k.stride(), *v.stride(), *text_k.stride()[:3], *text_v.stride()[:3]),
        *(H, k.shape[2], text_k.shape[2], chunk, chunks[0], sum(chunks), scale),
        *(D, *widths, tile.hidden, tile.block, len(tokens) > 1),
    )
    return sum_over_chunks(sums).view(B, H, *inner.step_shape(D))


def launch_apply(
    queries: Sequence[Tensor], weights: Sequence[Tensor], step: Tensor, scale: float, inner: Inner
) -> list[Tensor]:
    """The outputs (B, H, N, D) for the queries of each part of a sequence."""
    queries = lying_alike(queries)
    q, text_q = queries[0], queries[-1]
    B, H, N, D = q.shape
    widths, tile, slices = tile_for(inner.on_queries, q)
    chunk, chunks, _ = chunks_of(queries, tile, B * H)
    outs = [like_tokens(each) for each in queries]
    launch(
        *(_kernel(inner.on_queries), (B * H, sum(chunks)), q, tile),
        *(q, text_q, *_taken(weights, inner.of_queries), step.contiguous(), outs[0], outs[-1]),
        *(*q.stride(), *text_q.stride()[:3], *outs[0].stride(), *outs[-1].stride()[:3]),
        *(H, N, text_q.shape[2], chunk, chunks[0], *inner.numbers(scale)),
        *(D, *widths, tile.hidden, tile.block, slices, *inner.switches, len(queries) > 1),
    )
    return outs


def launch_apply_backward(
    tokens: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], step: Tensor, scale: float, inner: Inner
) -> tuple[list[Tensor], Tensor]:
    """From the gradient of the output and the queries of each part of a sequence.

    The gradients of the queries; and (B, H, *gradients_shape) in float32, of which `inner` gives those of the step and
    minus those of the weights of every image.
    """
    name = f"{inner.on_queries}_backward"
    d_outs, queries = (lying_alike(each) for each in zip(*tokens, strict=True))
    (do, text_do), (q, text_q) = ((each[0], each[-1]) for each in (d_outs, queries))
    B, H, N, D = q.shape
    widths, tile, slices = tile_for(name, q)
    chunk, chunks, _ = chunks_of(queries, tile, B * H)
    sums = q.new_empty(B * H, sum(chunks), *inner.gradients_shape(D), dtype=torch.float32)
    gradients = [like_tokens(each) for each in queries]
    dq, text_dq = gradients[0], gradients[-1]
    launch(
        *(_kernel(name), (B * H, sum(chunks)), q, tile),
        *(do, q, text_do, text_q, *_taken(weights, inner.of_queries), step.contiguous(), dq, text_dq, sums),
        *(*do.stride(), *q.stride(), *text_do.stride()[:3], *text_q.stride()[:3], *dq.stride(), *text_dq.stride()[:3]),
        *(H, N, text_q.shape[2], chunk, chunks[0], sum(chunks), *inner.numbers(scale)),
        *(D, *widths, tile.hidden, tile.block, slices, *inner.switches, len(tokens) > 1),
    )
    return gradients, sum_over_chunks(sums).view(B, H, *inner.gradients_shape(D))


def launch_accumulate_backward(
    d_step: Tensor, tokens: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], scale: float, inner: Inner
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of the keys and values of all parts of a sequence, and in float32 partial sums of those of the
    weights that the step depends on.

    Args:
        d_step: (B, H, *step_shape); where fewer than three weights step, it may be a part of a larger tensor.

    Returns:
        dk and dv, (B, H, N, D) of each part; (groups of images, H, chunks, weights, D, D), see `weights_summed`.
    """
    name = f"{inner.on_keys}_backward"
    keys, values = (lying_alike(each) for each in zip(*tokens, strict=True))
    (k, text_k), (v, text_v) = ((each[0], each[-1]) for each in (keys, values))
    B, H, N, D = k.shape
    widths, tile, slices = tile_for(name, k)
    chunk, chunks, images = chunks_of(keys, tile, H, B)
    groups = ceil_div(B, images)
    d_keys, d_values = ([like_tokens(each) for each in tensors] for tensors in (keys, values))
    (dk, text_dk), (dv, text_dv) = ((each[0], each[-1]) for each in (d_keys, d_values))
    sums = k.new_empty(groups, H, sum(chunks), len(inner.of_keys), D, D, dtype=torch.float32)
    launch(
        *(_kernel(name), (groups * H, sum(chunks)), k, tile),
        *(d_step, k, v, text_k, text_v, *_taken(weights, inner.of_keys), dk, dv, text_dk, text_dv, sums),
        *(*k.stride(), *v.stride(), *text_k.stride()[:3], *text_v.stride()[:3]),
        *(*dk.stride(), *dv.stride(), *text_dk.stride()[:3], *text_dv.stride()[:3]),
        *(B, H, N, text_k.shape[2], images, chunk, chunks[0], scale, *([d_step.stride(1)] if inner.steps < 3 else [])),
        *(D, *widths, tile.hidden, tile.block, slices, len(tokens) > 1),
    )
    return d_keys, d_values, sums


def weights_summed(sums: Tensor) -> Tensor:
    """The gradients of the weights (weights, H, D, D) from what `launch_accumulate_backward` gives."""
    return sums.sum((0, 2)).transpose(0, 1).contiguous()


def _kernel(name: str) -> Any:
    return KERNELS[f"{name}_kernel"]


def _taken(weights: Sequence[Tensor], places: Iterable[int]) -> list[Tensor]:
    """The weights that a kernel takes."""
    return contiguous(*(weights[place] for place in places))


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# torch.compile would fix the value of a float argument, and with it the number of tokens from which the scale comes. A
# Number is traced as it is.
@op("ttt_accumulate")
def _accumulate(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, scale: Number, inner: str) -> Tensor:
    return launch_accumulate([(k, v)], present(w1, w2, w3), float(scale), INNERS[inner])


@torch.library.register_fake("t5kernels::ttt_accumulate")
def _(k, v, w1, w2, w3, scale, inner):
    B, H, _, D = k.shape
    return k.new_empty(B, H, *INNERS[inner].step_shape(D), dtype=torch.float32)


@op("ttt_accumulate_backward")
def _accumulate_backward(
    d_step: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, scale: Number, inner: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv, and in float32 the gradients (weights, H, D, D) of the weights `of_keys`."""
    weights = present(w1, w2, w3)
    [dk], [dv], sums = launch_accumulate_backward(d_step.contiguous(), [(k, v)], weights, float(scale), INNERS[inner])
    return dk, dv, weights_summed(sums)


@torch.library.register_fake("t5kernels::ttt_accumulate_backward")
def _(d_step, k, v, w1, w2, w3, scale, inner):
    _, H, _, D = k.shape
    d_weights = k.new_empty(len(INNERS[inner].of_keys), H, D, D, dtype=torch.float32)
    return like_tokens(k), like_tokens(v), d_weights


def _keep_for_accumulate(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.inner = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_accumulate(ctx, d_step):
    k, v, *weights = ctx.saved_tensors
    dk, dv, d_weights = _accumulate_backward(d_step, k, v, *weights, ctx.scale, ctx.inner)
    return dk, dv, *_at_places(d_weights, INNERS[ctx.inner].of_keys, weights), None, None


_differentiable_accumulate = differentiable(_accumulate, _keep_for_accumulate, _differentiate_accumulate)


@op("ttt_apply")
def _apply(q: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, step: Tensor, scale: Number, inner: str) -> Tensor:
    return launch_apply([q], present(w1, w2, w3), step, float(scale), INNERS[inner])[0]


@torch.library.register_fake("t5kernels::ttt_apply")
def _(q, w1, w2, w3, step, scale, inner):
    return like_tokens(q)


@op("ttt_apply_backward")
def _apply_backward(
    d_out: Tensor, q: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, step: Tensor, scale: Number, inner: str
) -> tuple[Tensor, Tensor]:
    """dq, and (B, H, *gradients_shape) as `launch_apply_backward` gives it."""
    weights = present(w1, w2, w3)
    (dq,), gradients = launch_apply_backward([(d_out, q)], weights, step, float(scale), INNERS[inner])
    return dq, gradients


@torch.library.register_fake("t5kernels::ttt_apply_backward")
def _(d_out, q, w1, w2, w3, step, scale, inner):
    B, H, _, D = q.shape
    return like_tokens(q), q.new_empty(B, H, *INNERS[inner].gradients_shape(D), dtype=torch.float32)


def _keep_for_apply(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.inner = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_apply(ctx, d_out):
    q, *weights, step = ctx.saved_tensors
    dq, gradients = _apply_backward(d_out, q, *weights, step, ctx.scale, ctx.inner)
    inner = INNERS[ctx.inner]
    d_weights = -inner.weight_gradients(gradients).sum(0).transpose(0, 1)
    return dq, *_at_places(d_weights, inner.of_queries, weights), inner.step_gradient(gradients), None, None


_differentiable_apply = differentiable(_apply, _keep_for_apply, _differentiate_apply)


def _at_places(gradients: Tensor, places: Sequence[int], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the places of their weights and in their dtypes."""
    by_place = dict(zip(places, gradients.unbind(0), strict=True))
    return [by_place[n].to(w.dtype) if w is not None and n in by_place else None for n, w in enumerate(weights)]
