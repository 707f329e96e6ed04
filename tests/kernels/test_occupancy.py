"""The kernels compile for the H100 as they are tuned: without a card, by the compiler alone."""

import os
import re
import subprocess
import sys

import pytest

# Bytes a thread: what the present tiles take with the compilers that were tried, and a little more.
SPILLED = {"accumulate": 16, "accumulate_backward": 512, "apply_backward": 128}
LINE = re.compile(r"(\d+)  (\w+) +registers +(\d+)  spilled +(\d+)  shared +(\d+)")


def told(*arguments):
    """What the command prints, by head width and kernel; in a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "t5kernels.occupancy", *arguments]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return {(int(width), kernel): tuple(map(int, rest)) for width, kernel, *rest in LINE.findall(output)}


@pytest.mark.slow
def test_no_kernel_spills_more_than_it_did_and_all_fit_a_multiprocessor():
    found = told("--width", "64", "72")
    assert len(found) == 16
    for (width, kernel), (registers, spilled, shared) in found.items():
        assert 0 < registers <= 255
        assert spilled <= SPILLED.get(kernel, 0), (width, kernel)
        assert shared <= 227 * 1024
