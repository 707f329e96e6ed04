"""The shift ratio is what its formula says, of the keys that attention sees, beside a random-init control."""

import pytest
import torch
from tiny import KINDS, random_images, tiny_vit
from torch import nn

import t5lib
from t5lib.analysis.key_shift import shift_ratio
from t5lib.utils.errors import T5Error


def by_hand(model: nn.Module, images: torch.Tensor) -> list[list[float]]:
    """‖mean key‖ / mean ‖key‖ for each layer and head, averaged over images, from what reaches softmax attention."""
    keys, wanted = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        keys.append(k)
        return wanted(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(images)
    return [
        [
            sum((k[h].mean(0).norm() / k[h].norm(dim=1).mean()).item() for k in layer) / len(layer)
            for h in range(layer.shape[1])
        ]
        for layer in keys
        if layer.shape[2] > 1
    ]


def test_shift_ratio_of_known_keys():
    apart = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    alike = torch.tensor([[3.0, 4]]).expand(4, 2)
    half = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    ratios = shift_ratio(torch.stack([apart, alike, half])[None])
    torch.testing.assert_close(ratios, torch.tensor([0.0, 1.0, 0.5**0.5]))
    two_images = torch.stack([apart, alike])[:, None]
    torch.testing.assert_close(shift_ratio(two_images), torch.tensor([0.5]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "siglip"])
def test_every_layer_and_head_is_measured_on_the_keys_that_attention_sees(kind):
    model, images = tiny_vit(kind), random_images()
    found = t5lib.diagnose(model, images)
    assert found.layers == ("blocks.0.attn", "blocks.1.attn")
    torch.testing.assert_close(torch.tensor(found.shift_ratio), torch.tensor(by_hand(model, images)))


def test_attention_pooling_is_not_taken_for_a_layer():
    found = t5lib.diagnose(tiny_vit("siglip"), random_images())
    assert [len(heads) for heads in found.shift_ratio] == [2, 2]


def test_a_key_bias_shows_and_the_control_does_not_have_it():
    model, images = tiny_vit(), random_images()
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[32:64] += 50
    found = t5lib.diagnose(model, images)
    assert min(found.shift_ratio[1]) > 0.9
    assert max(map(max, found.random_init)) < 0.9
    assert found.random_init == t5lib.diagnose(tiny_vit(), images).random_init
    assert found.random_init != t5lib.diagnose(model, images, seed=1).random_init


def test_summary_is_of_layers():
    found = t5lib.analysis.key_shift.Diagnosis(
        layers=("a", "b"), shift_ratio=((0.2, 0.4), (0.5, 0.7)), random_init=((0.1, 0.1), (0.2, 0.2))
    )
    expected = {"mean_shift_ratio": 0.45, "mean_shift_ratio_random_init": 0.15, "min": 0.3, "max": 0.6}
    assert found.summary() == pytest.approx(expected)
    assert found.as_dict()["layers"] == ("a", "b")


def test_the_model_and_the_global_random_state_are_as_before():
    model = tiny_vit(drop_path_rate=0.5).train()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    one = t5lib.diagnose(model, random_images())
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert one.shift_ratio == t5lib.diagnose(model.eval(), random_images()).shift_ratio


def test_a_model_in_half_precision_is_measured():
    found = t5lib.diagnose(tiny_vit().bfloat16(), random_images())
    exact = t5lib.diagnose(tiny_vit(), random_images())
    torch.testing.assert_close(torch.tensor(found.shift_ratio), torch.tensor(exact.shift_ratio), atol=0.02, rtol=0)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(T5Error, match=r"must hold images \(B, 3, H, W\), got \(3, 32, 32\)"):
        t5lib.diagnose(tiny_vit(), torch.zeros(3, 32, 32))
    with pytest.raises(T5Error, match="is converted already"):
        t5lib.diagnose(t5lib.convert(tiny_vit()), random_images())


def test_a_model_that_timm_cannot_make_afresh_is_refused():
    from timm.layers import Attention

    model = tiny_vit()
    model.blocks[0].attn = Attention(32, 2, qkv_bias=True, gated=True)
    with pytest.raises(T5Error, match=r"(?s)no random control.*blocks\.0\.attn\.gate"):
        t5lib.diagnose(model, random_images())


def test_weights_that_are_not_finite_are_refused():
    model = tiny_vit()
    with torch.no_grad():
        model.get_submodule("blocks.0.attn.qkv").weight[0, 0] = torch.nan
    with pytest.raises(T5Error, match=r"the model holds numbers that are not finite, in 1 weights: blocks\.0\.attn"):
        t5lib.diagnose(model, random_images())
