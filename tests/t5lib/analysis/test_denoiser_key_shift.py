"""The shift of a denoiser's keys: every attention, text's keys too, on noised latents."""

import pytest
import torch
from tiny_denoisers import dit_batch, sd3_batch, tiny_dit, tiny_sd3

import t5lib
from t5lib.analysis.key_shift import DIAGNOSIS
from t5lib.data.batches import seeded
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow
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
    model, given, keys = make(), batch(0, 18), []  # more than are run at once
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **options):
        keys.append(k)
        return attend(q, k, v, *args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(**objective.noised(given, seeded(0, DIAGNOSIS)).inputs)
    expected = [(k.mean(2).norm(dim=-1) / k.norm(dim=-1).mean(2)).mean(0) for k in keys]
    found = t5lib.diagnose(model, given, objective=objective)
    assert found.layers == tuple(t5lib.families.family_of(model).attention_names(model))
    torch.testing.assert_close(torch.tensor(found.shift_ratio), torch.stack([expected[i] for i in order]))
    other = make(seed=1)
    assert t5lib.diagnose(other, given, objective=objective).random_init == found.random_init
    assert not any(module._forward_hooks for module in model.modules())


def test_latents_without_an_objective_are_refused():
    with pytest.raises(T5Error, match=r"got dict; a denoiser needs an objective"):
        t5lib.diagnose(tiny_dit(), dit_batch(0))
