"""How PyTorch's threads wait is the user's to say, and ours where the user says nothing."""

import os

import pytest

from t5lib.utils import openmp


@pytest.mark.parametrize(
    ("ours", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["default", "spin count of the user", "wait policy of the user"],
)
def test_threads_give_up_a_busy_wait_soon_unless_the_user_says_otherwise(monkeypatch, ours, expected):
    monkeypatch.setattr(os, "environ", dict(ours))
    openmp.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
