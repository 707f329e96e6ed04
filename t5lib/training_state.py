"""Checkpoints of a running training: whole or not there, the newest kept, written by Accelerate."""

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Counter:
    """How far a training is: optimizer steps done and seconds spent."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write `folder`/step-N; a kill at any moment leaves this one or the one before it whole."""
    final = folder / f"step-{step:07d}"
    temporary = folder / f".{final.name}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> bool:
    """Continue from the newest whole checkpoint in `folder`; false when there is none."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return False
    accelerator.load_state(str(found[-1]))
    return True
