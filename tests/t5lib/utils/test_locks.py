"""One process at a time works on a thing, and the others know which."""

import os
import socket
import subprocess
import sys
import threading

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
    assert line.startswith(f"stage demo of a is in the hands of process {os.getpid()} on {socket.gethostname()} since ")


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    lock = tmp_path / "demo.lock"
    code = f"""
import os
from pathlib import Path
from t5lib.utils.locks import exclusive
with exclusive(Path({str(lock)!r}), "demo"):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert "-c" in lock.read_text()
    said = []
    with exclusive(lock, "demo", said.append):
        assert said == []
