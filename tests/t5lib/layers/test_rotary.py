"""Queries and keys are turned as timm turns them, and their products tell how far apart the tokens are."""

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat

from t5lib.layers.rotary import rotated

layouts = pytest.mark.parametrize("half", [False, True], ids=["neighbours", "halves"])


def table(half: bool, rows: int = 3, columns: int = 5) -> torch.Tensor:
    return RotaryEmbeddingCat(16, in_pixels=False, temperature=100.0, rotate_half=half).get_embed([rows, columns])


@layouts
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_patches_are_turned_as_timm_does_and_tokens_before_them_are_not(half, prefix):
    x = torch.randn(2, 4, prefix + 15, 16)
    turned = rotated(x, table(half), prefix, half)
    assert torch.equal(turned[:, :, :prefix], x[:, :, :prefix])
    torch.testing.assert_close(turned[:, :, prefix:], apply_rot_embed_cat(x[:, :, prefix:], table(half), half=half))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@layouts
def test_every_head_may_have_a_table_of_its_own(half):
    x, tables = torch.randn(2, 4, 15, 16), torch.stack([table(half) * (i + 1) for i in range(4)])
    expected = [rotated(x[:, i : i + 1], tables[i], 0, half) for i in range(4)]
    torch.testing.assert_close(rotated(x, tables, 0, half), torch.cat(expected, dim=1))


@layouts
def test_products_depend_on_how_far_apart_two_patches_are(half):
    q, k = torch.randn(2, 1, 1, 1, 16).expand(-1, 1, 1, 15, 16)
    products = rotated(q, table(half), 0, half) @ rotated(k, table(half), 0, half).mT
    apart = [products[0, 0, i, i + 1] for i in (0, 1, 2, 3, 5, 6, 7, 8)]
    torch.testing.assert_close(torch.stack(apart), apart[0].expand(8), rtol=1e-4, atol=1e-4)
    assert abs(products[0, 0, 0, 1] - products[0, 0, 0, 5]) > 1e-3


def test_the_precision_of_the_tokens_is_kept():
    assert rotated(torch.randn(1, 1, 15, 16, dtype=torch.bfloat16), table(False), 0, False).dtype == torch.bfloat16
