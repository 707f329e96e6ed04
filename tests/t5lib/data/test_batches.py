"""Batches come without end, from any batch on, and what cannot be used is refused."""

from itertools import count, islice

import pytest

from t5lib.data.batches import open_batches
from t5lib.utils.errors import T5Error


def take(batches, start: int, number: int) -> list[int]:
    return list(islice(open_batches(batches, start), number))


def test_a_loader_is_repeated_and_entered_at_any_batch():
    assert take([0, 1, 2], 0, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert take([0, 1, 2], 4, 4) == [1, 2, 0, 1]


def test_a_function_is_asked_for_the_batch_to_begin_with():
    assert take(lambda start: count(start), 5, 3) == [5, 6, 7]


def test_batches_that_end_are_refused_with_how_far_they_went():
    with pytest.raises(T5Error, match=r"ended after number 7; .* without end"):
        take(lambda start: iter([1, 2]), 5, 3)
    with pytest.raises(T5Error, match="ended after number 5"):
        take(lambda start: iter([]), 5, 1)


def test_an_iterator_that_is_used_up_is_refused():
    with pytest.raises(T5Error, match="an iterator that is used up cannot be repeated: pass a loader"):
        take(iter([1, 2]), 0, 3)
    with pytest.raises(T5Error, match="gave no batch"):
        take([], 0, 1)
