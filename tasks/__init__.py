"""The stages, a module each, and what runs them."""

import os
import sys

# A flow runs `python -m tasks.…`: before anything heavy is imported (tasks/runtime/warm.py).
if "T5_WARM_START" in os.environ and sys.orig_argv[1] == "-m" and sys.orig_argv[2].startswith("tasks."):
    from tasks.runtime import warm

    warm.hand_over(sys.orig_argv[2], sys.orig_argv[3:])
