"""Attention by feature maps is a weighted mean of the values, in full precision where it sums."""

import pytest
import torch
from t5kernels import linear_attention

B, H, N, F, D = 2, 3, 7, 6, 4


def features(count: int = N, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(B, H, count, F, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).to(dtype)


def values(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(B, H, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_each_output_is_the_mean_of_the_values_weighted_by_products_of_features():
    q, k, v = features(3), features(), values()
    weights = torch.einsum("bhif,bhjf->bhij", q, k)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(linear_attention(q, k, v), expected, rtol=1e-12, atol=1e-12)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(linear_attention, leaves, fast_mode=True)


def test_sums_over_many_tokens_hold_in_half_precision_and_under_autocast():
    """The normalizer is 2 · 4 · 4 · 4096, more than float16 can hold; the mean is none of bfloat16's numbers."""
    k = torch.full((1, 1, 4096, 2), 4.0)
    v = torch.linspace(0, 0.6002, 4096).view(1, 1, -1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_attention(k, k, v)[0, 0, 0].item() == pytest.approx(0.3001, rel=1e-4)
    half = linear_attention(k.half(), k.half(), v.half())
    assert half.dtype == torch.float16
    assert half[0, 0, 0].item() == pytest.approx(0.3001, rel=1e-3)


def test_a_batch_may_be_empty():
    x = torch.zeros(0, H, N, F, requires_grad=True)
    out = linear_attention(x, x, x)
    assert out.shape == x.shape
    out.sum().backward()


def test_a_query_whose_features_are_all_zero_gives_zero_and_finite_gradients():
    q, k, v = features().float().zero_().requires_grad_(), features().float().requires_grad_(), values().float()
    out = linear_attention(q, k, v)
    out.sum().backward()
    assert out.eq(0).all()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((B, H, N, F), (B, H, N, F + 1), (B, H, N, D)),
        ((B, H, N, F), (B, H, N + 1, F), (B, H, N, D)),
        ((B, H, N, F), (B, H, N, F), (B, H + 1, N, D)),
        ((H, N, F), (H, N, F), (H, N, D)),
    ],
    ids=["features", "tokens", "heads", "dimensions"],
)
def test_shapes_that_do_not_fit_are_refused_with_what_came(q, k, v):
    with pytest.raises(ValueError, match=r"linear_attention: q_features .* expected") as refused:
        linear_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    assert all(str(shape) in str(refused.value) for shape in (q, k, v))
