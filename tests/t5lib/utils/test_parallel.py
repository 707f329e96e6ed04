from threading import Event

import pytest

from t5lib.utils.parallel import ahead


def test_results_keep_the_order_of_the_items_whoever_is_done_first():
    second = Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(10)
        if item == 1:
            second.set()
        return -item

    assert list(ahead(work, range(5), workers=2, count=2)) == [0, -1, -2, -3, -4]


def test_items_are_taken_as_they_are_needed():
    taken = []
    results = ahead(lambda item: item, (taken.append(i) or i for i in range(100)), workers=2, count=3)
    assert next(results) == 0 and len(taken) == 4
    results.close()


def test_an_error_comes_where_its_result_would():
    results = ahead(lambda item: 1 // item, [1, 0], workers=2, count=1)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
