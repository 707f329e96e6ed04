"""The shift of a denoiser's keys: every attention, text's keys too, on noised latents."""

import pytest
import torch
from tiny_denoisers import dit_batch, sd3_batch, tiny_dit, tiny_sd3

import t5lib
from t5lib.analysis.key_shift import shift_ratio
from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow, noised_batch
from t5lib.utils.errors import T5Error


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


@pytest.mark.parametrize(("scope", "text"), [("joint", "linear"), ("modality", "linear"), ("joint", "exact")])
def test_the_shift_after_the_key_norm_is_that_of_keys_normalized_in_the_layers_own_scope(scope, text):
    """Without the mean taken off, what each part is divided by decides about the shift of the whole."""
    model = tiny_sd3()
    config = TTTConfig(key_norm="instance_no_mean", key_norm_scope=scope, text=text, locality="none")
    inputs = noised_batch(sd3_batch(0, 4), RectifiedFlow(), 0)
    found = t5lib.explain(model, t5lib.convert(model, config), inputs)
    adapter, calls, heads = family_of(model), {}, {}
    name = adapter.attention_names(model)[0]
    handles = adapter.watch(model.get_submodule(name), calls, heads, name)
    with torch.no_grad():
        adapter.call(model, inputs)
        k = adapter.project(model.get_submodule(name), calls[name])[1]
    for handle in handles:
        handle.remove()
    sizes = [part.shape[1] for part in calls[name].tokens]
    if text == "exact":
        k = k[:, :, : sizes[0]]  # the inner model is fitted on the image alone
    parts = [k] if scope == "joint" else k.split(sizes, dim=2)
    normed = [part / (part.var(2, keepdim=True, correction=0) + config.key_norm_eps).sqrt() for part in parts]
    assert found.shift_after[0] == pytest.approx(shift_ratio(torch.cat(normed, dim=2)).mean().item(), rel=1e-4)
