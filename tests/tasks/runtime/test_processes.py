"""A record tells whether its process is gone."""

from tasks.runtime import processes


def test_only_a_process_of_this_host_that_has_ended_is_gone():
    host, pid, began = processes.identity().split()
    assert not processes.is_gone(processes.identity())
    assert processes.is_gone(f"{host} {pid} {float(began) - 100:.0f}")  # another one had the number
    assert processes.is_gone(f"{host} {2**22 + 1} {began}")
    assert not processes.is_gone(f"elsewhere {pid} 0")
    assert not processes.is_gone("")
