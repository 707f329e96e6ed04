"""Where another DVC process is at the same files a flow waits for it; what a killed one left is not waited for."""

import json
import os
import subprocess
import sys

import pytest

from flows import dvc_locks

REFUSAL = """\
ERROR: failed to reproduce 'fetch@small': 'data/out/small/fetch' is busy, it is being blocked by:
  (PID {pid}): dvc repro fetch@small

If there are no processes with such PIDs, you can manually remove '.dvc/tmp/rwlock' and try again."""


@pytest.fixture
def rwlock(tmp_path):
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path / ".dvc/tmp/rwlock"


def running(folder):
    """A process with `dvc` in its command line, until its input is closed and a moment longer.

    It is waited for until it runs: just after the fork a command line can be empty.
    """
    program = "import sys, time; print(flush=True); sys.stdin.read(); time.sleep(0.2)"
    command = [sys.executable, "-c", program, "dvc"]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def refusal(pid):
    return [line for line in REFUSAL.format(pid=pid).splitlines() if line]


def test_it_waits_for_the_process_that_dvc_names_and_says_so(tmp_path):
    other, said = running(tmp_path), []

    def say(line):
        said.append(line)
        other.stdin.close()

    assert dvc_locks.settled(tmp_path, refusal(other.pid), say)
    assert other.poll() == 0
    assert said == [f"process {other.pid} (dvc repro fetch@small) is working on the same files; waiting until it ends"]
    other.stdout.close()


def test_a_stranger_with_the_number_of_a_killed_dvc_is_taken_off_its_list(tmp_path, rwlock):
    mine, other = {"pid": os.getpid(), "cmd": "dvc repro a"}, {"pid": 1, "cmd": "dvc repro b"}
    users = {"write": {"a": mine, "b": other}, "read": {"c": [mine], "d": [mine, other]}}
    rwlock.write_text(json.dumps(users))
    assert dvc_locks.settled(tmp_path, refusal(os.getpid()), pytest.fail)
    assert json.loads(rwlock.read_text()) == {"write": {"b": other}, "read": {"d": [other]}}


def test_a_list_that_a_killed_process_left_half_written_is_emptied(tmp_path, rwlock):
    torn = "ERROR: failed to reproduce 'fetch@small': Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is "
    rwlock.write_text('{"write": {')
    assert dvc_locks.settled(tmp_path, [f"{torn}corrupted: Expecting value: line 1 column 1 (char 0)"], pytest.fail)
    assert json.loads(rwlock.read_text()) == {}


def test_a_list_that_a_living_process_may_be_writing_stays(tmp_path, rwlock):
    rwlock.write_text("")
    other = running(tmp_path)
    assert not dvc_locks.mend(tmp_path)
    other.kill()
    other.communicate()
    assert rwlock.read_text() == "" and dvc_locks.mend(tmp_path)


def test_other_failures_are_not_waited_for(tmp_path):
    assert not dvc_locks.settled(tmp_path, ["ERROR: failed to reproduce 'x'"], pytest.fail)


def test_none_of_dvcs_advice_is_shown():
    assert all(dvc_locks.REFUSAL.match(line) for line in refusal(7))
