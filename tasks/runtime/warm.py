"""Stages that start at once: a process that has imported the libraries already forks for each of them.

PyTorch, timm, diffusers and MLflow take 15 to 20 seconds to import, most of a small stage's time. While a flow runs it
keeps one process, started by `serving`, that imports them once. `python -m tasks.…` finds it by the variable ADDRESS,
hands its arguments, environment and outputs over, and waits. The work is done in a fork of that process; it imports our
own code afresh, so that what runs is what DVC has seen. Signals are passed on, and when the waiting process is killed,
so is the work.

Without the variable, where that process does not answer, and elsewhere than on Linux, a stage runs as any other
command does.
"""

import atexit
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ctypes import CDLL
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ADDRESS = "T5_WARM_START"  # the socket's path
KEPT = "T5_WARM_START_FOR_OTHERS"  # the same in a fork, for processes that the stage starts (tasks/runtime/launch.py)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEATH_SIGNAL = 1  # of Linux's prctl: PR_SET_PDEATHSIG
LENGTH, ANSWER = struct.Struct("!I"), struct.Struct("!B")
STARTED = 255  # is no exit status that a stage has


@contextmanager
def serving(libraries: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Within, the environment yielded makes stages start from a process that has imported `libraries`."""
    if sys.platform != "linux":  # elsewhere a fork of a process with these libraries may crash
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="t5-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(folder) / "socket")
        listener.bind(address)
        listener.listen()  # calls wait while the first library is being imported
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno()), *libraries],
            pass_fds=[listener.fileno()],
            env=dict(environment) | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},  # or else an import may start CUDA
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with process:
            try:
                yield {ADDRESS: address}
            finally:
                process.kill()  # stages that it forked for are on their own


def serve(listener: socket.socket, libraries: Sequence[str]) -> None:
    """Until standard input ends, fork for everyone who calls; then remove the folder of the socket.

    Calls are answered from the first library on: the check of settings, which comes first, needs no others.
    """
    with listener:
        left = list(libraries)
        while True:
            if left:
                with suppress(ImportError):  # the stage that needs it will say so
                    import_module(left.pop(0))
            if not left:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
            ready, _, _ = select.select([listener, sys.stdin], [], [], 0 if left else None)
            if sys.stdin in ready:  # the flow was killed
                shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
                return
            if listener in ready:
                caller, _ = listener.accept()
                if os.fork() == 0:
                    listener.close()
                    _work_for(caller)
                caller.close()


def hand_over(module: str, arguments: Sequence[str]) -> None:
    """Have `python -m module arguments` done by the process at ADDRESS and exit as it did, or return where none is."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(os.environ[ADDRESS])
            request = json.dumps([module, list(arguments), os.getcwd(), dict(os.environ)]).encode()
            socket.send_fds(server, [LENGTH.pack(len(request))], [0, 1, 2])
            server.sendall(request)
        except OSError:
            return
        if "RANK" in os.environ:
            end_with_launcher()
        before = {n: signal.signal(n, lambda n, _frame: server.sendall(ANSWER.pack(n))) for n in SIGNALS}
        if server.recv(ANSWER.size) != ANSWER.pack(STARTED):
            for number, handler in before.items():
                signal.signal(number, handler)
            return
        status = server.recv(ANSWER.size)
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    if not status and "RANK" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)  # so that the launcher of several sees what happened
    if not status:
        sys.exit(f"{module}: its process was killed; if memory ran out, use a smaller batch_size")
    sys.exit(ANSWER.unpack(status)[0])


def end_with_launcher() -> None:
    """Let this process be interrupted when its launcher is killed, which can then signal no one."""
    if sys.platform == "linux":
        CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


def _work_for(caller: socket.socket) -> NoReturn:
    status = 1
    try:
        os.setsid()  # signals come from the caller alone, not from a terminal too
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        module, arguments = _take_over(caller)
        caller.sendall(ANSWER.pack(STARTED))
        threading.Thread(target=_pass_signals_on, args=[caller], daemon=True).start()
        status = _run(module, arguments)
        for number in SIGNALS:  # they would come too late: a launcher ends all its processes when one has failed
            signal.signal(number, signal.SIG_IGN)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            caller.sendall(ANSWER.pack(status))
        os._exit(status)  # without taking thousands of modules apart


def _take_over(caller: socket.socket) -> tuple[str, list[str]]:
    """Become the process that called: its outputs, folder and environment. Returns the module and its arguments."""
    header, outputs, _, _ = socket.recv_fds(caller, LENGTH.size, 3)
    [length] = LENGTH.unpack(header)
    module, arguments, folder, environment = json.loads(caller.recv(length, socket.MSG_WAITALL))
    for number, given in enumerate(outputs):
        os.dup2(given, number)
        os.close(given)
    os.environ.clear()
    os.environ.update(environment)
    os.environ[KEPT] = os.environ.pop(ADDRESS)  # or `tasks`, imported afresh, would hand us over to ourselves
    os.chdir(folder)
    sys.path[0] = folder
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]  # as PYTHONUNBUFFERED has it
    return module, arguments


def _pass_signals_on(caller: socket.socket) -> None:
    with suppress(OSError):
        while number := caller.recv(ANSWER.size):
            os.kill(os.getpid(), ANSWER.unpack(number)[0])
    os.killpg(0, signal.SIGKILL)  # the caller was killed


def _run(module: str, arguments: Sequence[str]) -> int:
    """The exit status of `python -m module arguments`, done here with our own code as the caller's folder has it."""
    sys.argv[1:] = arguments
    for name in [name for name in sys.modules if name.partition(".")[0] == "tasks"]:
        del sys.modules[name]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
