"""Pictures of an explanation show what was found, over the image that the model saw."""

import warnings

import numpy as np
import pytest
import torch

from t5lib.report import explanation_plots, plots

LAYERS = [f"blocks.{index}.attn" for index in range(3)]
QUERIES = {"centre": 5, "class token": None}


def found(**changes):
    maps = [
        {
            "image": image,
            "layer": layer,
            "query": query,
            "patch": patch,
            "softmax": [[0.1] * 4, [0.05, 0.35, 0.1, 0.1]],
            "converted": [[0.125] * 4] * 2,
        }
        for image in (0, 1)
        for layer in (0, 2)
        for query, patch in QUERIES.items()
    ]
    return {
        "layers": LAYERS,
        "distance_softmax": [2.0, 1.0, 3.0],
        "distance_converted": [2.0, 3.0, 3.5],
        "distance_uniform": 3.6,
        "layer_error": [0.0, 0.1, 0.2],
        "block_error": [0.0, 0.5, 2.0],
        "cka": [1.0, 0.99, 0.6],
        "shift_softmax": [0.9, 0.8, 0.7],
        "shift_before": [0.9, 0.8, 0.7],
        "shift_after": [None, 0.0, 0.0],
        "shift_fitted": [None, 0.3, 0.3],
        "maps": maps,
        **changes,
    }


PICTURES = np.linspace(0, 1, 2 * 16 * 32 * 3).reshape(2, 16, 32, 3)


@pytest.mark.parametrize("name", ["maps-0", "maps-1", "distance", "similarity", "shift"])
def test_every_picture_renders_without_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = explanation_plots.all_pictures(found(), PICTURES)[name]
        svg = plots.svg(figure)
    assert "<svg" in svg


def test_maps_lie_over_their_image_with_the_query_framed():
    panels = np.array(explanation_plots.all_pictures(found(), PICTURES)["maps-1"].axes).reshape(4, 2)
    assert [panel.get_ylabel() for panel in panels[:, 0]] == [
        "centre\nsoftmax",
        "centre\nT5",
        "class token\nsoftmax",
        "class token\nT5",
    ]
    assert [panel.get_title() for panel in panels[0]] == ["layer 0", "layer 2"]
    below, above = panels[0, 0].images
    np.testing.assert_allclose(below.get_array(), PICTURES[1].mean(-1))
    assert list(below.get_extent()) == list(above.get_extent()) == [0, 32, 16, 0]
    assert above.get_array()[1, 1] == 1  # the strongest patch
    frame = panels[0, 0].patches[0]
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((8, 8), 8, 8)
    assert not panels[2, 0].patches


def test_layers_that_agree_exactly_or_have_no_key_norm_leave_a_gap():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = found(layer_error=[0.0] * 3, block_error=[0.0] * 3, cka=[1.0] * 3, shift_after=[None] * 3)
        for figure in explanation_plots.curves(same).values():
            plots.svg(figure)
    lines = explanation_plots.curves(found())["shift"].axes[0].lines
    assert np.isnan(lines[2].get_ydata()[0])


def test_curves_show_both_models_and_what_looking_everywhere_gives():
    axes = explanation_plots.curves(found())["distance"].axes[0]
    uniform, softmax, converted = axes.lines
    assert list(softmax.get_ydata()) == [2.0, 1.0, 3.0] and softmax.get_color() == plots.SOFTMAX
    assert list(converted.get_ydata()) == [2.0, 3.0, 3.5] and set(uniform.get_ydata()) == {3.6}


def test_the_models_input_becomes_a_picture_again():
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    given = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    np.testing.assert_allclose(explanation_plots.as_pictures(given, mean, std), pixels.movedim(1, -1), atol=1e-6)
    assert explanation_plots.as_pictures(given * 100, mean, std).max() == 1
