"""What jobs do in the tests of the pool of processes; other processes import them from here, so nothing heavy is."""

import os
import time
from pathlib import Path

from t5lib.utils.errors import T5Error


def do(job: str) -> str:
    """What the job's name says."""
    if job == "dies":
        os._exit(3)
    if job == "breaks":
        raise ZeroDivisionError("division by zero")
    if job == "is refused":
        raise T5Error("too few images")
    print(f"{job} at work")
    return job.upper()


def surroundings(job: float) -> dict[str, str | None]:
    """What this process sees of cards and threads, after `job` seconds: long enough that every process gets one."""
    time.sleep(job)
    return {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")} | {"pid": os.getpid()}


def wait_for_interrupt(job: Path) -> None:
    """Say that it is at work, and leave a note when it is interrupted, as a training leaves a checkpoint."""
    try:
        job.with_suffix(".begun").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        job.with_suffix(".saved").touch()
        raise
