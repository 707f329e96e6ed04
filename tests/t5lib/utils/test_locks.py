"""One process at a time works on a thing, and the others know which."""

import os
import socket
import subprocess
import sys
import threading
import time

from filelock import FileLock

from t5lib.utils.locks import exclusive


def test_who_comes_second_says_who_is_at_work_and_waits(tmp_path):
    lock, said, order, release = tmp_path / "a/demo.lock", [], [], threading.Event()

    def second():
        with exclusive(lock, "stage demo of a", lambda line: (said.append(line), release.set())):
            order.append("second")

    with exclusive(lock, "stage demo of a"):
        thread = threading.Thread(target=second)
        thread.start()
        assert release.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    [line] = said
    assert line.startswith(f"stage demo of a is in use by process {os.getpid()} on {socket.gethostname()} since ")


def test_a_holder_that_has_only_just_begun_is_named_too(tmp_path):
    """Between taking the lock and writing the name into it lies a moment."""
    path, said = tmp_path / "demo.lock", []
    lock = FileLock(path)
    lock.acquire()
    thread = threading.Thread(target=_enter, args=(path, said))
    thread.start()
    time.sleep(0.1)
    path.write_text("process 7 on here")
    while thread.is_alive() and not said:
        time.sleep(0.01)
    lock.release()
    thread.join(10)
    assert said == ["demo is in use by process 7 on here; waiting until it ends"]


def _enter(path, said):
    with exclusive(path, "demo", said.append):
        pass


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    lock = tmp_path / "demo.lock"
    code = f"""
import os
from pathlib import Path
from filelock import FileLock

from t5lib.utils.locks import exclusive
with exclusive(Path({str(lock)!r}), "demo"):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert "-c" in lock.read_text()
    said = []
    with exclusive(lock, "demo", said.append):
        assert said == []
