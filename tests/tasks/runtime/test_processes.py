"""One process at a time works on a thing, the others know which; a record tells whether its process is gone."""

import os
import socket
import subprocess
import sys
import threading

from tasks.runtime import processes


def test_who_comes_second_says_who_is_at_work_and_waits(tmp_path):
    lock, said, order, release = tmp_path / "a/demo.lock", [], [], threading.Event()

    def second():
        with processes.exclusive(lock, "stage demo of a", lambda line: (said.append(line), release.set())):
            order.append("second")

    with processes.exclusive(lock, "stage demo of a"):
        thread = threading.Thread(target=second)
        thread.start()
        assert release.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    [line] = said
    assert line.startswith(f"stage demo of a is in the hands of process {os.getpid()} on {socket.gethostname()} since ")


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    lock = tmp_path / "demo.lock"
    code = f"""
import os
from pathlib import Path
from tasks.runtime.processes import exclusive
with exclusive(Path({str(lock)!r}), "demo"):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert "-c" in lock.read_text()
    said = []
    with processes.exclusive(lock, "demo", said.append):
        assert said == []


def test_only_a_process_of_this_host_that_has_ended_is_gone():
    host, pid, began = processes.identity().split()
    assert not processes.is_gone(processes.identity())
    assert processes.is_gone(f"{host} {pid} {float(began) - 100:.0f}")  # another one had the number
    assert processes.is_gone(f"{host} {2**22 + 1} {began}")
    assert not processes.is_gone(f"elsewhere {pid} 0")
    assert not processes.is_gone("")
