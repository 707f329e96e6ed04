"""The stages, a module each, and what runs them."""

import os
import sys

# A flow starts a stage: before anything heavy is imported (tasks/runtime/warm.py).
if "T5_WARM_START" in os.environ and sys.orig_argv[1:2] == ["-m"] and len(sys.orig_argv) == 4:
    from tasks.runtime import warm

    warm.hand_over(*sys.orig_argv[2:])
