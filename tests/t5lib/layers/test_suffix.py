"""Text tokens after the grid's are to every mixer what class tokens before it are."""

import pytest
import torch

from t5lib.layers import ttt_mixer
from t5lib.layers.config import INNERS, LOCALITIES, SCOPES, TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

H, D, TEXT = 2, 4, 3
BEFORE, AFTER = TokenGrid(5, 6, num_prefix_tokens=TEXT), TokenGrid(5, 6, num_suffix_tokens=TEXT)


def tokens() -> torch.Tensor:
    """q, k, v with the text last, (3, B, H, N, D); keys of image and text are shifted apart."""
    drawn = torch.randn(3, 2, H, 30 + TEXT, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn[1, :, :, 30:] += 3
    return drawn


def mixer(**settings):
    torch.manual_seed(0)
    return make_mixer(H, D, TTTConfig(**settings)).double()


def _normalized(mix, keys: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    return mix.localized(keys, keys, grid)[1]


@pytest.mark.parametrize(
    "settings",
    [{"inner": inner} for inner in INNERS] + [{"locality": locality} for locality in LOCALITIES],
    ids=lambda settings: next(iter(settings.values())),
)
def test_text_after_the_image_is_mixed_as_before_it(settings):
    mix, qkv = mixer(**settings), tokens()
    torch.testing.assert_close(mix(*qkv, AFTER), mix(*qkv.roll(TEXT, dims=3), BEFORE).roll(-TEXT, dims=2))


@pytest.mark.parametrize(
    "settings", [{}, {"inner": "hedgehog"}, {"rescale": True, "locality": "dwc_v+nat3"}], ids=lambda given: str(given)
)
@pytest.mark.parametrize("scope", SCOPES)
def test_image_and_text_that_lie_apart_are_mixed_as_one_sequence(settings, scope):
    mix, qkv = mixer(**settings, key_norm_scope=scope), tokens()
    image, text = mix.joint(tuple(qkv[:, :, :, :30]), tuple(qkv[:, :, :, 30:]), TokenGrid(5, 6))
    torch.testing.assert_close(torch.cat([image, text], dim=2), mix(*qkv, AFTER))


def test_the_op_gets_image_and_text_without_a_copy(monkeypatch):
    seen = []

    def listening(image, weights, settings, *, text, **others):
        seen.extend((*image, *text))
        return image[0], text[0]

    monkeypatch.setattr(ttt_mixer, "ttt_layer", listening)
    qkv = tokens()
    mixer()(*qkv, AFTER)
    assert {t.untyped_storage().data_ptr() for t in seen} == {qkv.untyped_storage().data_ptr()}
    assert [t.shape[2] for t in seen] == [30] * 3 + [TEXT] * 3


@pytest.mark.parametrize("kind", ["instance", "instance_no_std", "instance_no_mean"])
def test_a_key_norm_by_modality_takes_statistics_of_each_apart(kind):
    mix, keys = mixer(key_norm=kind, key_norm_scope="modality", locality="none"), tokens()[1]
    alone = mixer(key_norm=kind, locality="none")
    image, text = _normalized(mix, keys, AFTER).split([30, TEXT], dim=2)
    torch.testing.assert_close(image, _normalized(alone, keys[:, :, :30], TokenGrid(5, 6)))
    torch.testing.assert_close(text, _normalized(alone, keys[:, :, 30:], TokenGrid(1, TEXT)))
    assert not torch.allclose(mix(*tokens(), AFTER), alone(*tokens(), AFTER))


@pytest.mark.parametrize("scope", SCOPES)
def test_without_text_the_scope_of_the_key_norm_makes_no_difference(scope):
    qkv = tokens()[:, :, :, :30]
    assert torch.equal(mixer(key_norm_scope=scope)(*qkv, TokenGrid(5, 6)), mixer()(*qkv, TokenGrid(5, 6)))


def test_neighborhoods_are_of_image_tokens_alone():
    plain, near = (mixer(locality=locality)(*tokens(), AFTER) for locality in ("dwc_qk", "dwc_qk+nat3"))
    assert torch.equal(plain[:, :, 30:], near[:, :, 30:])
    assert not torch.allclose(plain[:, :, :30], near[:, :, :30])


def test_tokens_that_do_not_fit_are_told_with_the_text():
    with pytest.raises(T5Error, match=r"holds 30 tokens and num_prefix_tokens is 0, 3 text tokens .* got 32 tokens"):
        mixer()(*tokens()[:, :, :, 1:], AFTER)


def test_an_unknown_scope_is_refused():
    with pytest.raises(T5Error, match="key_norm_scope 'modal' is unknown; expected one of joint, modality"):
        TTTConfig(key_norm_scope="modal")
