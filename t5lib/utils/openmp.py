"""How PyTorch's threads wait for each other on a CPU."""

import os


def wait_briefly() -> None:
    """Let the threads give up their busy loops soon, unless the user's environment says how they wait.

    Two programs at once take each other's cores by such loops: on two cores each was ten times as slow as alone. With
    this many rounds (GNU's OpenMP has 300,000) it is four times, and a program alone loses nothing. The variable is
    read when PyTorch is imported, so this comes before. Imports nothing.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
