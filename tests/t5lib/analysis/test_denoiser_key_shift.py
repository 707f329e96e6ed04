"""The shift of a denoiser's keys: every attention, text's keys too, on noised latents."""

import pytest
import torch
from tiny_denoisers import dit_batch, sd3_batch, tiny_dit, tiny_sd3

import t5lib
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow, noised_batch
from t5lib.utils.errors import T5Error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("make", "batch", "objective", "order"),
    [
        (tiny_sd3, sd3_batch, RectifiedFlow(), [0, 2, 4, 1, 3]),  # joint attentions first; a block runs joint, attn2
        (tiny_dit, dit_batch, NoiseAndVariance(), [0, 1]),
    ],
    ids=["sd3", "dit"],
)
def test_every_layer_and_head_is_measured_on_the_keys_that_attention_sees(make, batch, objective, order):
    model, keys = make(), []
    inputs = noised_batch(batch(0, 18), objective, 0)  # more than are run at once
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **options):
        keys.append(k)
        return attend(q, k, v, *args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(**inputs)
    expected = [(k.mean(2).norm(dim=-1) / k.norm(dim=-1).mean(2)).mean(0) for k in keys]
    found = t5lib.diagnose(model, inputs)
    assert found.layers == tuple(t5lib.families.family_of(model).attention_names(model))
    torch.testing.assert_close(torch.tensor(found.shift_ratio), torch.stack([expected[i] for i in order]))
    other = make(seed=1)
    assert t5lib.diagnose(other, inputs).random_init == found.random_init
    assert not any(module._forward_hooks for module in model.modules())


def test_latents_that_were_not_noised_are_refused():
    with pytest.raises(T5Error, match=r"got 'latents', 'labels'. A denoiser's latents and captions are noised first"):
        t5lib.diagnose(tiny_dit(), dit_batch(0))
