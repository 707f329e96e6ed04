"""The stages, a module each, and what runs them."""

import os
import sys

from t5lib.utils import openmp

openmp.wait_briefly()  # stages run side by side, and beside other programs

# A flow runs `python -m tasks.…`, and launchers of several processes `python -u -m tasks.…`: before anything heavy is
# imported (tasks/runtime/warm.py).
_command = [word for word in sys.orig_argv[1:] if word != "-u"]
if "T5_WARM_START" in os.environ and _command[:1] == ["-m"] and _command[1].startswith("tasks."):
    from tasks.runtime import warm

    warm.hand_over(_command[1], _command[2:])
