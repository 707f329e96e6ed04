"""The linear probe on patches, and what is told of fidelity and of usefulness."""

import dataclasses

import pytest
import torch
from tiny import random_images, tiny_vit
from torch import Tensor

import t5lib
from t5lib.evaluation.dense import (
    DenseSums,
    ProbeConfig,
    compare,
    fit_probe,
    gather_features,
    mean_iou,
    patch_features,
    resampled,
    summary,
)
from t5lib.utils.errors import T5Error

KINDS = torch.tensor([0, 0, 1, 1, 2])  # five entities, three classes


def clusters(count: int = 300) -> tuple[Tensor, Tensor]:
    """Features of three classes that a line parts, one of them rare, on channels of very different scale."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(count) % 10).clamp_max(2) % 3
    centres = torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]])
    features = centres[labels] + 0.5 * torch.randn(count, 4, generator=generator)
    return features * torch.tensor([1.0, 1e3, 1e-3, 0.0]) + 7, labels


def batches(count: int = 3):
    """Images of 4 × 4 patches, and which entity each shows."""
    entities = torch.arange(16).view(1, 4, 4) % len(KINDS)
    return [(random_images(2, seed=number), entities.expand(2, -1, -1)) for number in range(count)]


def test_a_probe_tells_classes_apart_whatever_the_scale_of_channels():
    features, labels = clusters()
    probe = fit_probe(features, labels, 3)
    assert (probe.predict(features) == labels).float().mean() > 0.99
    assert probe.logits(features.view(30, 10, 4)).shape == (30, 10, 3)


def test_a_probe_is_the_minimum_of_its_loss_and_the_same_every_time():
    features, labels = clusters()
    probe, again = (fit_probe(features, labels, 3, ProbeConfig(l2=0.1)) for _ in range(2))
    assert torch.equal(probe.weight, again.weight) and torch.equal(probe.bias, again.bias)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    logits = (features - probe.mean) / probe.deviation @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, labels) + 0.05 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_balance_counts_classes_alike():
    """Two classes that share a place: the frequent one wins there unless classes count alike."""
    features = torch.cat([torch.zeros(30, 1), torch.ones(20, 1)])
    labels = torch.cat([torch.zeros(20), torch.ones(10), torch.full((20,), 2)]).long()
    for balance, margin in ((0.0, torch.tensor(2.0).log()), (1.0, torch.tensor(0.0))):
        logits = fit_probe(features, labels, 3, ProbeConfig(l2=1e-5, balance=balance)).logits(torch.zeros(1))
        torch.testing.assert_close(logits[0] - logits[1], margin, atol=0.05, rtol=0)


def test_mean_iou_has_the_value_of_its_definition():
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 4, 0]])
    assert mean_iou(confusion).item() == pytest.approx((6 / 9 + 3 / 6 + 0 + 0) / 4)
    assert mean_iou(confusion[:3, :3]).item() == pytest.approx((6 / 9 + 3 / 6) / 2)  # the third is nowhere


def test_patch_features_are_those_of_the_last_norm():
    model, images = tiny_vit("dinov2_registers"), random_images()
    features = patch_features(model, images)
    assert features.shape == (4, 4, 4, 32)
    torch.testing.assert_close(features.flatten(1, 2), model.forward_features(images)[:, model.num_prefix_tokens :])


def test_a_model_compared_with_itself_is_a_perfect_copy():
    source = tiny_vit()
    features, entities = gather_features(source, batches())
    probe = fit_probe(features, KINDS[entities], 3)
    measures = compare(source, source, batches(), probe=probe, class_of_entity=KINDS).measures()
    assert measures["fidelity_miou"] == measures["agreement"] == 100
    assert measures["cosine"].item() == pytest.approx(1)
    assert measures["lost_miou"] == 0 and measures["own_probe_miou"] == measures["source_miou"]


def test_measures_are_those_of_all_patches_taken_together():
    source, student = tiny_vit(), t5lib.convert(tiny_vit())
    features, entities = gather_features(source, batches())
    probe = fit_probe(features, KINDS[entities], 3)
    own_features, _ = gather_features(student, batches())
    own = fit_probe(own_features, KINDS[entities], 3)
    sums = compare(source, student, batches(), probe=probe, own_probe=own, class_of_entity=KINDS)
    theirs, ours, labels = probe.predict(features), probe.predict(own_features), KINDS[entities]

    def iou(expected: Tensor, predicted: Tensor) -> float:
        each = [
            ((expected == kind) & (predicted == kind)).sum() / ((expected == kind) | (predicted == kind)).sum()
            for kind in range(3)
        ]
        return 100 * torch.stack(each).mean().item()

    expected = {
        "source_miou": iou(labels, theirs),
        "miou": iou(labels, ours),
        "own_probe_miou": iou(labels, own.predict(own_features)),
        "fidelity_miou": iou(theirs, ours),
        "agreement": 100 * (theirs == ours).float().mean().item(),
        "cosine": torch.nn.functional.cosine_similarity(features, own_features, dim=-1).mean().item(),
        "lost_miou": iou(labels, theirs) - iou(labels, ours),
    }
    assert {name: value.item() for name, value in sums.measures().items()} == pytest.approx(expected, rel=1e-5)


def sums_of(patches: Tensor) -> DenseSums:
    """The same counts for everything."""
    return DenseSums(
        source=patches, student=patches, own=patches, fidelity=patches, cosine=patches.sum((1, 2)).double()
    )


def test_sums_of_folds_add_up():
    one, two = sums_of(torch.ones(5, 3, 3).long()), sums_of(torch.eye(3).long().expand(5, 3, 3))
    both = one + two
    assert both.student[0].tolist() == [[2, 1, 1], [1, 2, 1], [1, 1, 2]] and both.cosine[0] == 12


def test_the_bootstrap_draws_tested_entities_of_every_class_anew():
    patches = torch.zeros(5, 3, 3, dtype=torch.int64)
    patches[[0, 1, 2, 4]] = 1  # entity 3 was not tested
    weights = resampled(sums_of(patches), KINDS, draws=500)
    assert torch.equal(weights[:, :2].sum(1), torch.full((500,), 2))
    assert weights[:, 3].sum() == 0 and (weights[:, [2, 4]] == 1).all()  # the only ones of their class
    assert weights[:, 0].float().mean().item() == pytest.approx(1, abs=0.1) and set(weights[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(weights, resampled(sums_of(patches), KINDS, draws=500))


def test_spread_is_wide_where_entities_differ_and_none_where_they_do_not():
    right, wrong = torch.eye(3).long() * 10, 10 * torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    rows = torch.eye(3).long()[KINDS]  # of an entity only the row of its class is counted
    alike = rows[:, :, None] * right
    mixed = rows[:, :, None] * torch.stack([right, wrong, right, wrong, right])
    for patches, least, most in ((alike, 0, 0), (mixed, 20, 100)):
        told = summary(sums_of(patches), KINDS, draws=200)["miou"]
        assert least <= told["high"] - told["low"] <= most and told["low"] <= told["value"] <= told["high"]


def test_what_does_not_fit_is_refused():
    features, labels = clusters()
    with pytest.raises(T5Error, match=r"features \(P, C\) with labels \(P,\), got \(300, 4\) and \(299,\)"):
        fit_probe(features, labels[1:], 3)
    with pytest.raises(T5Error, match="no batch to fit a probe on"):
        gather_features(tiny_vit(), [])
    probe = dataclasses.replace(fit_probe(features, labels, 3))
    with pytest.raises(T5Error, match="no batch to compare"):
        compare(tiny_vit(), tiny_vit(), [], probe=probe, class_of_entity=KINDS)
