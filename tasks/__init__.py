"""The stages, a module each, and what runs them."""

import os
import sys

# On a CPU PyTorch's threads wait for each other in a busy loop. Two stages at once, or a stage beside another program
# that computes, take each other's cores that way: on two cores each was ten times as slow as alone. With this many
# rounds (GNU's OpenMP has 300,000) it is four times, and a stage alone loses nothing. The variable is read when PyTorch
# is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# A flow runs `python -m tasks.…`, and launchers of several processes `python -u -m tasks.…`: before anything heavy is
# imported (tasks/runtime/warm.py).
_command = [word for word in sys.orig_argv[1:] if word != "-u"]
if "T5_WARM_START" in os.environ and _command[:1] == ["-m"] and _command[1].startswith("tasks."):
    from tasks.runtime import warm

    warm.hand_over(_command[1], _command[2:])
