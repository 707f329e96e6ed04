"""Heat maps and focus points of a decoder on two models."""

import pytest
import torch
from tiny import tiny_vit

import t5lib
from t5lib.evaluation.focus import _distance, compare_focus
from t5lib.utils.errors import T5Error
from t5lib.weights.focus_decoder import FocusDecoder


class Spot(torch.nn.Module):
    """Hot where the first channel is."""

    def forward(self, features):
        return features[..., 0]


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 32, 24, generator=generator), None) for _ in range(3)]


def test_a_model_has_the_focus_of_itself_and_another_has_not():
    source = tiny_vit(dynamic_img_size=True)
    same = compare_focus(source, source, Spot(), batches())
    assert same == {"correlation": pytest.approx(1), "distance": 0.0, "same_focus": 100.0}
    other = compare_focus(source, t5lib.convert(source), Spot(), batches())
    assert other["correlation"] < 0.999 and other["distance"] > 0 and other["same_focus"] < 100


def test_distances_are_shares_of_the_diagonal():
    first, second = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    first[0, 0, 0] = second[0, 2, 3] = 1.0
    assert _distance(first, second).item() == pytest.approx(13**0.5 / 5)


def test_the_heat_map_has_the_size_of_the_image():
    heat = FocusDecoder().eval()(torch.randn(2, 3, 5, 384))
    assert heat.shape == (2, 42, 70) and 0 <= heat.min() <= heat.max() <= 1


def test_no_batch_is_an_error():
    with pytest.raises(T5Error, match="no batch to compare the heat maps on"):
        compare_focus(tiny_vit(), tiny_vit(), Spot(), [])
