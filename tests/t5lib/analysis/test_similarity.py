"""Sums over batches give the error and the CKA of the whole."""

import pytest
import torch

from t5lib.analysis.similarity import CKA, RelativeError


def added(measure, *pairs):
    for pair in pairs:
        measure.add(*pair)
    return measure.value()


def test_error_is_the_squared_error_over_the_variance_whatever_the_batches():
    found, wanted = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)) + 3
    expected = ((found - wanted).square().mean() / wanted.var(correction=0)).item()
    assert added(RelativeError(), (found, wanted)) == pytest.approx(expected)
    assert added(RelativeError(), (found[:2], wanted[:2]), (found[2:], wanted[2:])) == pytest.approx(expected)
    assert added(RelativeError(), (wanted, wanted)) == 0
    assert added(RelativeError(), (wanted.mean().expand(6, 5), wanted)) == pytest.approx(1)


def test_cka_sees_neither_rotation_nor_scale_nor_shift_but_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) * torch.arange(1.0, 7)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    noise = torch.randn(500, 9, generator=generator)
    assert added(CKA(), (x, 3 * x @ rotation + 100)) == pytest.approx(1)
    assert added(CKA(), (x, noise)) < 0.05
    y = x + 2 * noise[:, :6]
    centred = [t.double() - t.double().mean(0) for t in (x, y)]
    gram_x, gram_y = (t @ t.T for t in centred)  # the definition with examples by examples
    expected = ((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())).item()
    assert 0.1 < expected < 0.99
    assert added(CKA(), (x[:99], y[:99]), (x[99:], y[99:])) == pytest.approx(expected)
