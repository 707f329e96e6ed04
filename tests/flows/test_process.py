"""Commands started by a flow: their lines arrive while they run, and they end when the flow does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flows.process import environment, stream

# Tells its own and its child's process id, then sleeps; on Ctrl-C it "saves a checkpoint", or holds out.
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # as stages do: a background shell made us ignore it
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
while True:
    try:
        print(os.getpid(), child.pid)
        time.sleep(60)
    except KeyboardInterrupt:
        print("one last word")
        if sys.argv[1] == "obedient":
            open("checkpoint", "w").close()
            raise
"""


def run(tmp_path, code, on_line, *arguments):
    return stream([sys.executable, "-c", code, *arguments], on_line, cwd=tmp_path, env=environment({}))


def test_lines_of_both_outputs_arrive_as_they_are_written_and_the_status_is_returned(tmp_path):
    lines = []

    def on_line(line):
        lines.append(line)
        (tmp_path / line).touch()

    code = """
import os, sys, time
print("one")
end = time.monotonic() + 30
while not os.path.exists("one") and time.monotonic() < end:
    time.sleep(0.05)
print("two\\r\\n\\nthree", file=sys.stderr)
sys.exit(3 if time.monotonic() < end else "nobody read it meanwhile")
"""
    assert run(tmp_path, code, on_line) == 3
    assert lines == ["one", "two", "three"]


def test_updates_of_a_progress_bar_are_lines(tmp_path):
    lines = []
    run(tmp_path, "print(' 10%\\r 20%\\r', end='')", lines.append)
    assert lines == [" 10%", " 20%"]


@pytest.mark.parametrize("kind", ["obedient", "stubborn"])
def test_an_interrupt_ends_the_whole_family_after_time_for_a_checkpoint(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("flows.process.PATIENCE", 2.0)
    family = []

    def interrupt(line):
        family.extend(map(int, line.split()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FAMILY, interrupt, kind)
    assert len(family) == 2
    assert not any(alive(pid) for pid in family)
    assert (tmp_path / "checkpoint").exists() == (kind == "obedient")


def flow(folder):
    """Code that runs the family as a flow does."""
    return f"""
import sys
from pathlib import Path
from flows.process import environment, interrupt_on_signals, stream
interrupt_on_signals()
command = [sys.executable, "-c", {FAMILY!r}, "obedient"]
stream(command, lambda line: print(line, flush=True), cwd=Path({str(folder)!r}), env=environment({{}}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["end", "terminal closed"])
def test_a_signal_ends_the_command_before_us(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", flow(tmp_path)], stdout=subprocess.PIPE, text=True)
    family = [int(pid) for pid in process.stdout.readline().split()]
    process.send_signal(number)
    process.send_signal(number)  # a terminal and `make` both tell
    process.wait()
    assert (tmp_path / "checkpoint").exists()
    assert len(family) == 2 and not any(alive(pid) for pid in family)


def test_a_killed_flow_takes_its_commands_with_it_after_time_for_a_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", flow(tmp_path)], stdout=subprocess.PIPE, text=True)
    family = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.communicate()
    assert len(family) == 2 and not any(alive(pid) for pid in family)
    assert (tmp_path / "checkpoint").exists()


def alive(pid):
    """A killed grandchild may wait a moment for init to collect it."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.1)
    return True


def test_children_find_this_python_first():
    assert environment({"A": "b"})["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    assert environment({"A": "b"})["A"] == "b"
