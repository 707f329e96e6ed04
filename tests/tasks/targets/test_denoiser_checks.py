"""Images that do not fit the denoiser are refused before any work."""

import dataclasses
from pathlib import Path

import pytest

from t5lib.data.shards import ShardSet
from t5lib.utils.errors import T5Error
from tasks.targets.denoiser_checks import _check_conditions

DATA = Path(__file__).parents[3] / "data"


@pytest.mark.parametrize("classes", [("a", "b"), tuple("abcdefghijk")])
def test_a_set_has_the_denoisers_classes_for_the_label_of_no_class_comes_after_them(classes):
    images = ShardSet.read(DATA / "fashion-mnist/val.json")
    _check_conditions(DATA / "dit-micro/model", None, (images, None))
    others = dataclasses.replace(images, classes=classes)
    with pytest.raises(T5Error, match=f"lists {len(classes)} classes; expected 10, those of the denoiser"):
        _check_conditions(DATA / "dit-micro/model", None, (None, others))
