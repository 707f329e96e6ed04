"""Key norms do what their formulas say; only those that subtract the token mean remove a shift common to all keys."""

import pytest
import torch
from t5kernels import KEY_NORMS, key_norm

EPS = 0.5
FORMULAS = {
    "none": lambda k: k,
    "rms": lambda k: k / (k.pow(2).mean(3, keepdim=True) + EPS).sqrt(),
    "layer": lambda k: (k - k.mean(3, keepdim=True)) / (k.var(3, keepdim=True, unbiased=False) + EPS).sqrt(),
    "instance": lambda k: (k - k.mean(2, keepdim=True)) / (k.var(2, keepdim=True, unbiased=False) + EPS).sqrt(),
    "instance_no_std": lambda k: k - k.mean(2, keepdim=True),
    "instance_no_mean": lambda k: k / (k.var(2, keepdim=True, unbiased=False) + EPS).sqrt(),
}
REMOVE_SHIFT = {"instance", "instance_no_std"}


@pytest.fixture
def keys() -> torch.Tensor:
    return torch.randn(2, 3, 11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 0.3


def test_every_key_norm_has_a_formula_here():
    assert set(KEY_NORMS) == set(FORMULAS)


@pytest.mark.parametrize("kind", KEY_NORMS)
def test_key_norm_follows_its_formula(kind, keys):
    torch.testing.assert_close(key_norm(keys, kind, EPS), FORMULAS[kind](keys), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KEY_NORMS)
def test_a_shift_common_to_all_keys_is_removed_by_centring_norms_alone(kind, keys):
    shift = torch.tensor([7.0, -3, 0.5, 100, 1], dtype=torch.float64)
    change = (key_norm(keys + shift, kind, EPS) - key_norm(keys, kind, EPS)).abs().max()
    assert change < 1e-12 if kind in REMOVE_SHIFT else change > 0.1


def test_images_and_heads_are_normalized_apart(keys):
    one = key_norm(keys[1:, 2:], "instance", EPS)
    torch.testing.assert_close(key_norm(keys, "instance", EPS)[1:, 2:], one, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", sorted(REMOVE_SHIFT))
def test_half_precision_keys_are_normalized_in_float32(kind, dtype, keys):
    half = (keys + 50).to(dtype)  # a shift as large as pretrained keys may carry
    out = key_norm(half, kind, EPS)
    assert out.dtype == dtype
    torch.testing.assert_close(out, key_norm(half.float(), kind, EPS).to(dtype), rtol=0, atol=0)
