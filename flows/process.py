"""Run a command, see its lines as they come, and leave nothing running behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

PATIENCE = 25.0  # seconds to save a checkpoint in; Prefect's worker waits 30 before it kills


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What children get: this Python first on the path, lines unbuffered, progress bars that suit a log."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    quiet = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10", "TQDM_NCOLS": "100", "SHELL": "/bin/sh"}
    return {**os.environ, "PATH": path, **quiet, **extra}


def stream(command: list[str], on_line: Callable[[str], None], *, cwd: Path, env: Mapping[str, str]) -> int:
    """Run `command` in `cwd`, call `on_line` for every line of its output, and return its exit status.

    A progress bar's update (a line that ends in a carriage return) counts as a line. Whatever stops this function,
    Ctrl-C or a cancelled flow run, also stops the command and all that it started.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.strip():
                on_line(line.rstrip())
        return process.wait()
    except BaseException:
        stop(process)
        raise


def stop(process: subprocess.Popen) -> None:
    """Ask the process and its children to finish, as Ctrl-C does (time to save a checkpoint), then insist."""
    try:
        for sign, seconds in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, 3.0)):
            os.killpg(process.pid, sign)
            try:
                process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                continue
    except ProcessLookupError:
        return
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also whatever outlived its parent
    process.wait()
