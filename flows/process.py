"""Run a command, see its lines as they come, and leave nothing running behind.

What a flow starts ends with it, also when it is killed and can do nothing itself: `python -m flows.process`, a process
beside it, sees the connection between them close and stops what it was told of.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

import psutil

PID = struct.Struct("!I")
PATIENCE = 25.0  # seconds to save a checkpoint in; Prefect's worker waits 30 before it kills


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What children get: this Python first on the path, lines unbuffered, progress bars that suit a log."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    quiet = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10", "TQDM_NCOLS": "100", "SHELL": "/bin/sh"}
    return {**os.environ, "PATH": path, **quiet, **extra}


def stream(command: list[str], on_line: Callable[[str], None], *, cwd: Path, env: Mapping[str, str]) -> int:
    """Run `command` in `cwd`, call `on_line` for every line of its output, and return its exit status.

    A progress bar's update (a line that ends in a carriage return) counts as a line. Whatever stops this function,
    Ctrl-C, a cancelled flow run or the end of this process, also stops the command and all that it started.
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
        end_with_us(process.pid, process.stdout)
        for line in process.stdout:
            if line.strip():
                on_line(line.rstrip())
        return process.wait()
    except BaseException:
        stop([psutil.Process(process.pid)])
        process.wait()
        raise


def interrupt_on_signals() -> None:
    """Let SIGTERM and the end of the terminal raise KeyboardInterrupt as Ctrl-C does: `stream` stops what it began.

    Ctrl-C does so also where a background shell made us ignore it; nohup keeps its effect.
    """

    def interrupt(number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGHUP):  # the same end is often told twice; only Ctrl-C insists
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def end_with_us(pid: int, output: IO | None = None) -> None:
    """Have a child, and those of its group if it leads one, stopped once this process is gone.

    Args:
        output: the end of the child's pipe that we read; it is read on, so that no last word of the child fails.
    """
    try:
        socket.send_fds(_watcher(), [PID.pack(pid)], [output.fileno()] if output else [])
    except BrokenPipeError:  # somebody ended the watcher
        _watcher.cache_clear()
        end_with_us(pid, output)


@cache
def _watcher() -> socket.socket:
    """The connection to the process that stops what we leave behind; nobody inherits our end of it."""
    ours, its = socket.socketpair()
    with its:
        subprocess.Popen(
            [sys.executable, "-m", "flows.process", str(its.fileno())],
            cwd=Path(__file__).parents[1],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return ours


def watch(flow: socket.socket) -> None:
    """Until the other end is closed, note the processes that it names; then stop those of them that still run."""
    left, outputs = [], []
    while True:
        message, descriptors, _, _ = socket.recv_fds(flow, PID.size, 1)
        if not message:
            break
        outputs += descriptors
        with suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(*PID.unpack(message)))
    for output in outputs:
        threading.Thread(target=_read_on, args=[output], daemon=True).start()
    stop([process for process in left if process.is_running()])


def _read_on(output: int) -> None:
    while os.read(output, 1 << 16):
        pass


def stop(processes: list[psutil.Process]) -> None:
    """Ask processes and their groups to finish, as Ctrl-C does (time to save a checkpoint), then insist."""
    groups = [process.pid for process in processes if _leads(process)]
    left = processes
    try:
        for sign, seconds in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            for process in left:
                _send(process, sign)
            left = psutil.wait_procs(left, timeout=seconds)[1]
    finally:
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)  # whatever outlived its parent


def _send(process: psutil.Process, sign: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if _leads(process):
            os.killpg(process.pid, sign)
        else:
            process.send_signal(sign)


def _leads(process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == process.pid
    except ProcessLookupError:
        return False


if __name__ == "__main__":
    watch(socket.socket(fileno=int(sys.argv[1])))
