"""The sentences say what the numbers say."""

import pytest

from t5lib.analysis.summary_text import explanation_reading


def found(**changes):
    return {
        "layers": ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"],
        "kinds": ["softmax", "swiglu, dwc_qk", "swiglu, dwc_qk"],
        "distance_softmax": [9.0, 2.0, 3.0],
        "distance_converted": [9.0, 2.1, 3.1],
        "distance_uniform": 4.0,
        "layer_error": [0.9, 0.1, 0.3],
        "block_error": [0.0, 0.2, 0.4],
        "cka": [1.0, 0.7, 0.9],
        "shift_before": [0.9, 0.6, 0.7],
        "shift_after": [None, 0.0, 0.0],
        "shift_fitted": [None, 0.0, 0.0],
        **changes,
    }


@pytest.mark.parametrize(
    ("converted", "verdict"),
    [
        ([9, 2.1, 3.1], "about as far as"),
        ([9, 1.0, 2.0], "nearer than"),
        ([9, 3.0, 3.5], "farther than"),
        ([9, 3.9, 4.0], "everywhere, with hardly any preference"),
    ],
)
def test_distance_is_judged_between_softmax_and_everywhere_over_converted_layers(converted, verdict):
    sentence = explanation_reading(found(distance_converted=converted))[0]
    assert verdict in sentence and "softmax 2.5" in sentence and "give 4.0" in sentence


def test_errors_and_cka_name_the_worst_layer():
    _, error, similarity, _ = explanation_reading(found())
    assert "miss 20\u202f% of the variance, blocks.2.attn most (30\u202f%)" in error
    assert "off by 40\u202f% of its variance" in error
    assert "CKA of 0.87 on average, least after blocks.1 (0.70)" in similarity


def test_shift_that_the_convolution_brings_back_or_the_norm_leaves_is_told():
    assert explanation_reading(found())[3] == "The key norm brings the shift ratio of the keys from 0.65 to 0.00."
    assert "fitted on it is 0.30: the convolution" in explanation_reading(found(shift_fitted=[None, 0.2, 0.4]))[3]
    kept = found(shift_after=[None, 0.6, 0.7], shift_fitted=[None, 0.6, 0.7])
    assert explanation_reading(kept)[3] == "The key norm leaves the shift ratio of the keys at 0.65."


def test_a_model_without_converted_layers_is_told_as_trained_only():
    first, second = explanation_reading(found(kinds=["softmax"] * 3))
    assert "No layer was converted" in first and "CKA" in second
