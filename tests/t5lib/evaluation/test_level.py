"""The bound by which two things are called level."""

import pytest

from t5lib.evaluation.level import upper_bound


def test_the_bound_is_students_of_a_mean():
    assert upper_bound([1.0, 2.0, 3.0]) == pytest.approx(2 + 2.91999 / 3**0.5)
    assert upper_bound([4.0, 4.0]) == 4


def test_a_single_value_has_none():
    assert upper_bound([1.0]) is None
