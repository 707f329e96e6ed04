"""The op is one exact step of its inner model, differentiable through that step; what does not fit is refused.

Everything is compared with what torch.autograd makes of the written inner models and losses, in float64.
"""

import pytest
import torch
from t5kernels import INNER_LOSSES, INNER_WEIGHTS, ttt, ttt_accumulate, ttt_apply
from t5kernels.ttt.api import INNER_MODELS
from torch.nn import functional as F
from torch.testing import assert_close

B, H, N, D = 2, 3, 5, 4
SCALE = D**-0.5 / N
WRITTEN = {
    "one_layer_gate": lambda x, w1, w2: (x @ w1) * F.silu(x @ w2),
    "two_layer": lambda x, w1, w2: F.silu(x @ w1) @ w2,
    "three_layer": lambda x, w1, w2, w3: F.silu(F.silu(x @ w1) @ w2) @ w3,
    "swiglu": lambda x, w1, w2, w3: (F.silu(x @ w1) * (x @ w2)) @ w3,
    "swiglu_last": lambda x, w1, w2, w3: (F.silu(x @ w1) * (x @ w2)) @ w3,
}
KEPT = {"swiglu_last": 2}  # first weights that take no step
LINEAR = {
    "linear": lambda q, k: (q, k),
    "linear_proj_qk": lambda q, k, w1, w2: (q @ w1, k @ w2),
}
LOSSES = {
    "dot": lambda f, v: -(f * v).sum(),
    "residual": lambda f, v: 0.5 * (f - v).square().sum(),
}
all_kinds = pytest.mark.parametrize(("inner", "loss"), [(i, l) for i in INNER_MODELS for l in INNER_LOSSES])


def inputs(inner: str, tokens: int = N, queries: int = N) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights = tuple(draw(H, D, D) for _ in range(INNER_WEIGHTS[inner]))
    return draw(B, H, queries, D), draw(B, H, tokens, D), draw(B, H, tokens, D), weights


def by_autograd(q, k, v, weights, inner: str, loss: str) -> torch.Tensor:
    """One gradient step per image and head, taken by autograd, then f(q)."""
    out = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            own = [w[h] for w in weights]
            if inner in LINEAR:
                mapped = LINEAR[inner](q[b, h], k[b, h], *own)
                out[b, h] = normalized_linear_step(*(F.elu(x) + 1 for x in mapped), v[b, h], loss)
            else:
                stepped = step(lambda *w: WRITTEN[inner](k[b, h], *w), own, v[b, h], loss)  # noqa: B023
                kept = KEPT.get(inner, 0)
                out[b, h] = WRITTEN[inner](q[b, h], *own[:kept], *stepped[kept:])
    return out


def step(model, weights, v, loss: str) -> list[torch.Tensor]:
    """The weights after one step of `model(*weights)` towards v."""
    weights = [w.clone().requires_grad_() for w in weights]
    gradients = torch.autograd.grad(SCALE * LOSSES[loss](model(*weights), v), weights)
    return [(w - g).detach() for w, g in zip(weights, gradients, strict=True)]


def normalized_linear_step(q_features, k_features, v, loss: str) -> torch.Tensor:
    """x W after one step from W = 0, over the same for values that are all 1."""
    fitted, normalizer = (
        q_features @ step(lambda w: k_features @ w, [v.new_zeros(D, D)], values, loss)[0]
        for values in (v, torch.ones_like(v))
    )
    return fitted / normalizer


def test_every_inner_model_and_loss_is_tested():
    assert set(INNER_MODELS) == set(WRITTEN) | set(LINEAR) == set(INNER_WEIGHTS)
    assert set(INNER_LOSSES) == set(LOSSES)


@all_kinds
def test_inner_step_is_the_gradient_of_the_written_loss(inner, loss):
    q, k, v, weights = inputs(inner)
    out = ttt(q, k, v, weights, inner=inner, loss=loss, scale=SCALE)
    expected = by_autograd(q, k, v, weights, inner, loss)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)


@all_kinds
def test_queries_may_be_more_tokens_than_keys(inner, loss):
    q, k, v, weights = inputs(inner, tokens=3, queries=7)
    out = ttt(q, k, v, weights, inner=inner, loss=loss, scale=SCALE)
    assert_close(out, by_autograd(q, k, v, weights, inner, loss), rtol=1e-12, atol=1e-12)


@all_kinds
def test_outer_gradients_go_through_the_inner_step(inner, loss):
    q, k, v, weights = inputs(inner, tokens=3, queries=2)
    leaves = [t.requires_grad_() for t in (q, k, v, *weights)]

    def run(q, k, v, *weights):
        return ttt(q, k, v, weights, inner=inner, loss=loss, scale=SCALE)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@all_kinds
def test_order_of_tokens_does_not_matter(inner, loss):
    q, k, v, weights = inputs(inner)
    order = torch.tensor([3, 0, 4, 1, 2])
    out = ttt(q, k, v, weights, inner=inner, loss=loss, scale=SCALE)
    shuffled = ttt(q, k[:, :, order], v[:, :, order], weights, inner=inner, loss=loss, scale=SCALE)
    assert_close(shuffled, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@all_kinds
def test_half_precision_stays_in_its_dtype_and_near_the_exact_result(inner, loss, dtype):
    q, k, v, weights = inputs(inner)
    small = [w * D**-0.5 for w in weights]
    half = ttt(q.to(dtype), k.to(dtype), v.to(dtype), [w.to(dtype) for w in small], inner=inner, loss=loss, scale=SCALE)
    exact = ttt(q, k, v, small, inner=inner, loss=loss, scale=SCALE)
    assert half.dtype == dtype
    assert (half.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


@all_kinds
def test_autocast_leaves_the_output_in_the_type_of_the_queries_and_near_the_exact_result(inner, loss):
    q, k, v, weights = inputs(inner)
    small = [w * D**-0.5 for w in weights]
    exact = ttt(q, k, v, small, inner=inner, loss=loss, scale=SCALE)
    single, small = [t.float() for t in (q, k, v)], [w.float() for w in small]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ttt(*single, small, inner=inner, loss=loss, scale=SCALE)
    assert mixed.dtype == torch.float32
    assert (mixed.double() - exact).norm() / exact.norm() < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": "swigloo"}, "inner='swigloo'"),
        ({"loss": "l1"}, "loss='l1'"),
        (
            {"weights": (torch.zeros(H, D, D),) * 2},
            r"takes 3 weights of shape \(3, 4, 4\), got \[\(3, 4, 4\), \(3, 4, 4\)\]",
        ),
        ({"weights": (torch.zeros(H, D, D + 1),) * 3}, r"takes 3 weights of shape \(3, 4, 4\), got \[\(3, 4, 5\)"),
        ({"k": torch.zeros(B, H, N, D + 1)}, r"k \(2, 3, 5, 5\)"),
        ({"k": torch.zeros(B, H, N + 1, D)}, r"k \(2, 3, 6, 4\), v \(2, 3, 5, 4\)"),
        ({"v": torch.zeros(B, H + 1, N, D)}, r"v \(2, 4, 5, 4\)"),
        ({"q": torch.zeros(B + 1, H, N, D)}, r"q \(3, 3, 5, 4\)"),
        ({"q": torch.zeros(H, N, D)}, r"q \(3, 5, 4\)"),
    ],
    ids=["inner", "loss", "number of weights", "shape of weights", "width", "tokens", "heads", "batch", "dimensions"],
)
def test_arguments_that_do_not_fit_are_refused_with_what_came(change, message):
    q, k, v, weights = inputs("swiglu")
    arguments = {"q": q, "k": k, "v": v, "weights": weights, "inner": "swiglu", "loss": "dot"} | change
    with pytest.raises(ValueError, match=message):
        ttt(**arguments, scale=SCALE)


@all_kinds
def test_a_batch_may_be_empty(inner, loss):
    q, k, v, weights = inputs(inner)
    tokens = [t[:0].requires_grad_() for t in (q, k, v)]
    out = ttt(*tokens, weights, inner=inner, loss=loss, scale=SCALE)
    assert out.shape == (0, H, N, D)
    out.sum().backward()


def test_the_halves_take_an_empty_batch():
    q, k, v, weights = inputs("swiglu")
    step = ttt_accumulate(k[:0], v[:0], weights, inner="swiglu", scale=SCALE)
    assert step.shape == (0, H, 3, D, D)
    assert ttt_apply(q[:0], weights, step, inner="swiglu").shape == (0, H, N, D)


def test_halves_of_models_that_take_no_step_are_refused():
    q, k, v, weights = inputs("swiglu")
    with pytest.raises(ValueError, match="inner='linear' takes no gradient step"):
        ttt_accumulate(k, v, (), inner="linear", scale=0.1)
    with pytest.raises(ValueError, match=r"step \(2, 3, 2, 4, 4\)"):
        ttt_apply(q, weights, torch.zeros(B, H, 2, D, D), inner="swiglu")
