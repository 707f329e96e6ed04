"""How a training stops and goes on: Ctrl-C between steps, and checkpoints that are whole or not there."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn

from t5lib.utils.files import read_json, write_json


@dataclass
class Done:
    """How far a training is: optimizer steps done and seconds spent."""

    step: int = 0
    seconds: float = 0.0


def save_checkpoint(accelerator: Accelerator, folder: Path, done: Done, ema: nn.Module | None) -> None:
    """Write `folder`/step-N; a kill at any moment leaves this one or the one before it whole."""
    final = folder / f"step-{done.step:07d}"
    temporary = folder / f".{final.name}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # not registered with Accelerate, which would unpickle them when they are loaded
        write_json(temporary / "done.json", asdict(done))
        if ema:
            save_model(ema, str(temporary / "ema.safetensors"))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path, done: Done, ema: nn.Module | None) -> None:
    """Continue from the newest whole checkpoint in `folder`, if there is one."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return
    accelerator.load_state(str(found[-1]))
    saved = Done(**read_json(found[-1] / "done.json"))
    done.step, done.seconds = saved.step, saved.seconds
    if ema:
        load_model(ema, found[-1] / "ema.safetensors")


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt at once.

    Covers the signals that would raise KeyboardInterrupt here (SIGINT, and SIGTERM where a program wants it so); none
    outside the main thread, which alone gets signals.
    """
    received: list[int] = []

    def remember(number: int, frame) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(number)

    main = threading.current_thread() is threading.main_thread()
    candidates = (signal.SIGINT, signal.SIGTERM) if main else ()
    covered = [number for number in candidates if signal.getsignal(number) is signal.default_int_handler]
    for number in covered:
        signal.signal(number, remember)
    try:
        yield lambda: bool(received)
    finally:
        for number in covered:
            signal.signal(number, signal.default_int_handler)
