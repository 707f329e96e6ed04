"""Processes that share the work: in order, to the end, and one that dies costs its own task alone."""

import os

import pytest

from tasks.studies.ablation.crew import Crew


class Fragile:
    """Does what its task's name says, in a process of the crew."""

    def __init__(self, plan, work, commit, jobs):
        self.done = 0

    def attempt(self, task):
        name = task[1]
        if name == "dies":
            os._exit(3)
        if name == "breaks":
            return "ZeroDivisionError"
        self.done += 1
        print(f"{name} at work")
        return None


def tasks(*names):
    return [("unit", name) for name in names]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_done_once_and_a_broken_one_is_told(tmp_path, jobs):
    told = {}
    with Crew(None, tmp_path, jobs, "", hand=Fragile) as crew:
        left = crew.do(tasks("a", "breaks", "b", "c"), lambda task, problem: told.update({task[1]: problem}))
        assert left == []
    assert told == {"a": None, "breaks": "ZeroDivisionError", "b": None, "c": None}


def test_a_process_that_dies_is_replaced_and_its_task_told(tmp_path):
    told = {}
    with Crew(None, tmp_path, 2, "", hand=Fragile) as crew:
        crew.do(tasks("dies", "dies", "dies", "a", "b"), lambda task, problem: told.update({task[1]: problem}))
        assert all(member.process.is_alive() for member in crew.workers.values())
        processes = [member.process for member in crew.workers.values()]
    assert told == {"dies": "its process ended with status 3; see its log", "a": None, "b": None}
    assert not any(process.is_alive() for process in processes)
    logs = "".join(log.read_text() for log in (tmp_path / "logs").iterdir())
    assert "a at work" in logs and "b at work" in logs


@pytest.mark.parametrize("jobs", [1, 2])
def test_nothing_is_begun_once_the_time_is_up(tmp_path, jobs):
    told = []
    with Crew(None, tmp_path, jobs, "", hand=Fragile) as crew:
        left = crew.do(tasks("a", "b", "c"), lambda task, problem: told.append(task[1]), lambda: not told)
    assert sorted(told + [name for _, name in left]) == ["a", "b", "c"]
    assert left and left == tasks(*"abc"[-len(left) :])
