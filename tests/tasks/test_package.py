"""What importing tasks does to a process before PyTorch is loaded."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("ours", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["default", "spin count of the user", "wait policy of the user"],
)
def test_threads_give_up_a_busy_wait_soon_unless_the_user_says_otherwise(ours, expected):
    free = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, sys, tasks; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], env=free | ours, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [expected, "False"]
