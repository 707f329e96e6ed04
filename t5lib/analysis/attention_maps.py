"""The attention map of layers that have none: how much each token's output depends on each token's value.

Shapes: B images, H heads, N tokens, D head width, Q queries, P probes.
"""

import math

import torch
from torch import Tensor, nn

from t5lib.layers.attention import TTTAttention, project
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import Mixer
from t5lib.utils.errors import T5Error

# Numbers in one tensor (B, H, N, D) of a chunk; a pass holds some tens of those, and of N×N maps in windowed layers.
CHUNK = {"cpu": 2**20, "cuda": 2**24}


def implicit_attention(
    attention: nn.Module,
    x: Tensor,
    grid: TokenGrid,
    *,
    rope: Tensor | None = None,
    queries: Tensor | list[int] | None = None,
    probes: int = 4,
    seed: int = 0,
) -> Tensor:
    """A(i, j) = ‖∂o_i/∂v_j‖_F / √D, for each image and head of any layer, softmax included.

    o and v are the head's outputs and values (D numbers a token). In softmax attention the Jacobian is the weight of
    token j times the identity, so A is the attention map itself. In a TTT layer it is a full D×D matrix, whose norm is
    estimated from `probes` products with random orthonormal directions (unbiased in the square; exact with D of them;
    one direction serves all tokens, so that rows compare better than the estimate is exact). The rows of a layer other
    than softmax do not sum to 1, and A has no sign.

    Cost: a pass of the layer, forward and backward, for each query and probe, in chunks of bounded memory.

    Args:
        attention: an attention of timm, with or without rotary positions, or a TTTAttention with any mixer.
        x: (B, N, C), the layer's input.
        grid: where x's tokens lie.
        rope: the rotary table that the layer is called with (t5lib.families.base.AttentionCall), if any.
        queries: the tokens i, as indices into N (prefix tokens first); all of them by default.
        probes: directions, 1 to D.
        seed: of the directions.

    Returns:
        (B, H, Q, N) in at least float32.

    Raises:
        T5Error: another kind of layer, or `queries` or `probes` out of range.
    """
    with torch.no_grad():
        qkv = projected(attention, x, grid, rope)
    mixer = attention.mixer if isinstance(attention, TTTAttention) else None
    return map_of(qkv, mixer, grid, queries=queries, probes=probes, seed=seed)


def map_of(
    qkv: tuple[Tensor, Tensor, Tensor],
    mixer: Mixer | None,
    grid: TokenGrid,
    *,
    queries: Tensor | list[int] | None = None,
    probes: int = 4,
    seed: int = 0,
) -> Tensor:
    """`implicit_attention` of what a layer of any family mixes: q, k and v (B, H, N, D), by softmax without a `mixer`.

    Raises:
        T5Error: `queries` or `probes` out of range.
    """
    q, k, _ = qkv
    queries = _checked(queries, q.shape[2]).to(q.device)
    if mixer is None:
        scores = (q[:, :, queries] * q.shape[3] ** -0.5 @ k.mT).to(_wide(q))
        return scores.softmax(-1).detach()
    if not 1 <= probes <= q.shape[3]:
        raise T5Error(f"probes is {probes}; expected 1 to the head width, {q.shape[3]}")
    directions = _directions(q.shape[3], probes, seed).to(q)
    which = torch.arange(len(queries), device=q.device).repeat_interleave(probes)
    squares = torch.zeros(*q.shape[:2], len(queries), q.shape[2], dtype=_wide(q), device=q.device)
    step = max(1, CHUNK.get(q.device.type, CHUNK["cpu"]) // q.numel())
    for chosen, direction in zip(which.split(step), directions.repeat(len(queries), 1).split(step), strict=True):
        parts = _pulled_back(mixer, qkv, grid, queries[chosen], direction)
        squares.index_add_(2, chosen, parts.movedim(0, 2).to(squares))
    return (squares / probes).sqrt()


def projected(
    attention: nn.Module, x: Tensor, grid: TokenGrid, rope: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D) that an attention of timm or a TTTAttention makes of its input (B, N, C).

    Raises:
        T5Error: it is neither.
    """
    if isinstance(attention, TTTAttention):
        x = attention.mixer.prepare(x, grid)
    elif not all(hasattr(attention, name) for name in ("qkv", "q_norm", "k_norm", "scale")):
        raise T5Error(
            f"{type(attention).__name__} is neither an attention of timm nor a TTTAttention; pass such a layer"
        )
    return project(attention, x, rope)


def attention_distance(weights: Tensor, queries: list[int], grid: TokenGrid) -> Tensor:
    """Mean distance, in patches, between a patch and what it attends to: (B, H), mean over the queries.

    The weights of a query are taken over the patches alone and made to sum to 1; tokens without a place in the grid
    are left out on both sides. As in "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 4.5.

    Args:
        weights: (B, H, Q, N), not negative.
        queries: which tokens they belong to; patches only.
        grid: the token layout.
    """
    prefix = grid.num_prefix_tokens
    places = torch.cartesian_prod(torch.arange(grid.rows), torch.arange(grid.columns)).to(weights)
    apart = torch.cdist(places[torch.tensor(queries) - prefix], places)
    return (over_patches(weights, prefix) * apart).sum(-1).mean(-1)


def over_patches(weights: Tensor, prefix: int) -> Tensor:
    """The part of (…, N) weights that is on patches, made to sum to 1."""
    patches = weights[..., prefix:]
    return patches / patches.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def spread_queries(grid: TokenGrid, limit: int) -> list[int]:
    """At most `limit` patches (a square number of them, or whole rows) in a lattice over the grid, as token indices."""
    side = max(1, math.isqrt(limit))
    rows, columns = _lattice(grid.rows, side), _lattice(grid.columns, side)
    return [grid.num_prefix_tokens + row * grid.columns + column for row in rows for column in columns]


def _lattice(length: int, count: int) -> list[int]:
    """Up to `count` positions of `length`, evenly and symmetrically spaced."""
    count = min(count, length)
    return [(2 * index + 1) * length // (2 * count) for index in range(count)]


def _pulled_back(mixer: Mixer, qkv: tuple[Tensor, ...], grid: TokenGrid, queries: Tensor, directions: Tensor) -> Tensor:
    """‖uᵀ ∂o_i/∂v_j‖² for pairs of a query i and a direction u, (pairs, B, H, N).

    Every pair has a copy of the images to itself: one ordinary backward pass serves all pairs, whatever ops the mixer
    is made of (many of them cannot be mapped over by torch.func).
    """
    pairs, (B, H, N, _) = len(queries), qkv[0].shape
    q, k, v = (t.detach().expand(pairs, -1, -1, -1, -1).flatten(0, 1) for t in qkv)
    with torch.enable_grad():
        v.requires_grad_()
        o = mixer(q, k, v, grid).unflatten(0, (pairs, B))
        asked = o[torch.arange(pairs, device=o.device), :, :, queries]  # (pairs, B, H, D)
        [gradient] = torch.autograd.grad((asked * directions[:, None, None].to(o)).sum(), v)
    return gradient.to(_wide(gradient)).square().sum(-1).view(pairs, B, H, N)


def _checked(queries: Tensor | list[int] | None, tokens: int) -> Tensor:
    if queries is None:
        return torch.arange(tokens)
    queries = torch.as_tensor(queries)
    if queries.ndim != 1 or not len(queries) or queries.min() < 0 or queries.max() >= tokens:
        raise T5Error(f"queries {queries.tolist()}: expected token indices from 0 to {tokens - 1}")
    return queries


def _directions(width: int, count: int, seed: int) -> Tensor:
    """(P, D), orthonormal, of random orientation."""
    gaussian = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.T[:count]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
