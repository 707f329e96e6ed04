"""Buckets keep area and aspect, an image goes to the nearest one, and its centre stays."""

import numpy as np
import pytest
from PIL import Image

from t5lib.data.buckets import BucketConfig, bucket_sizes, fit, nearest
from t5lib.utils.errors import T5Error


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), [(1024, 64, 2.0), (512, 16, 3.0), (64, 16, 1.5)])
def test_sizes_have_the_area_of_the_square_and_come_in_both_orientations(resolution, step, max_aspect):
    sizes = bucket_sizes(BucketConfig(resolution=resolution, step=step, max_aspect=max_aspect))
    assert (resolution, resolution) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert max(height, width) <= max_aspect * min(height, width)
        assert abs(height * width - resolution**2) <= max(height, width) * step / 2


def test_without_other_aspects_there_is_the_square_alone():
    assert bucket_sizes(BucketConfig(resolution=512, max_aspect=1.0)) == ((512, 512),)


def test_the_sizes_of_the_docstring():
    assert {(1024, 1024), (896, 1152), (832, 1216)} <= set(bucket_sizes(BucketConfig(resolution=1024)))


def test_an_image_goes_to_the_nearest_aspect():
    sizes = ((16, 16), (12, 20), (20, 12))
    assert nearest(sizes, 100, 100) == (16, 16)
    assert nearest(sizes, 60, 100) == (12, 20)
    assert nearest(sizes, 1000, 10) == (20, 12)
    # 1.29 lies nearer to 5/3 than to 1 by its logarithm, 1.28 does not
    assert nearest(sizes, 1000, 1295) == (12, 20)
    assert nearest(sizes, 1000, 1285) == (16, 16)


def test_of_one_aspect_the_largest_that_needs_no_enlarging():
    sizes = ((64, 64), (128, 128), (256, 256))
    assert nearest(sizes, 200, 200) == (128, 128)
    assert nearest(sizes, 128, 128) == (128, 128)
    assert nearest(sizes, 1000, 1000) == (256, 256)
    assert nearest(sizes, 10, 10) == (64, 64)


def test_fit_covers_the_size_and_keeps_centre_and_proportions():
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))  # each column bears its number
    fitted = np.array(fit(Image.fromarray(columns), (50, 50)))
    assert fitted.shape == (50, 50)
    np.testing.assert_allclose(fitted[25], np.arange(50, 150, 2) + 0.5, atol=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "buckets"),
        ({"sizes": ((64, 64),), "resolution": 64}, "buckets"),
        ({"sizes": ((64, 0),)}, r"sizes\.0\.1 is 0; expected 1 or more"),
        ({"resolution": 100, "step": 64}, "buckets"),
        ({"resolution": 64, "max_aspect": 0.5}, r"max_aspect is 0\.5; expected 1 or more"),
        ({"resolution": 64, "step": 0}, "step is 0; expected 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(T5Error, match=message):
        BucketConfig(**wrong)
