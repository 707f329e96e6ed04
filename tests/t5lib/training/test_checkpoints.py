"""A training that is stopped, at any moment and by any means, goes on and ends as if it had never stopped."""

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_job import (
    ALL_ON,
    PLAIN,
    STEPS,
    batches,
    converted,
    job,
    run,
    same,
    state,
)

from t5lib.training import checkpoints
from t5lib.training.trainer import Trainer
from t5lib.utils.errors import T5Error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def ctrl_c_counts():
    """A shell that starts us in the background lets us ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    model = converted()
    run(model, ALL_ON)
    return state(model)


@pytest.mark.parametrize("stop_at", [0, 5, 7, 15], ids=lambda n: f"batch {n}")
def test_a_run_that_broke_and_was_run_again_ends_with_the_same_bits(stop_at, uninterrupted, tmp_path):
    def dying(start):
        for number, item in enumerate(batches(start), start):
            if number == stop_at:
                raise OSError("disk gone")
            yield item

    with pytest.raises(OSError, match="disk gone"):
        run(converted(), ALL_ON, source=dying, resume_dir=tmp_path)
    model, steps = converted(), []
    run(model, ALL_ON, resume_dir=tmp_path, log=lambda _, step: steps.append(step))
    assert steps[0] == 3 * (stop_at // 6) + 1  # from the last checkpoint; a step is two batches
    assert same(state(model), uninterrupted)


def test_random_numbers_drawn_between_the_runs_do_not_matter(uninterrupted, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(converted(), ALL_ON, resume_dir=tmp_path, log=lambda _, step: 1 / (4 - step))
    torch.rand(17)
    model = converted()
    run(model, ALL_ON, resume_dir=tmp_path)
    assert same(state(model), uninterrupted)


@pytest.mark.parametrize("moment", ["in a step", "in a batch", "in the loader's processes", "in a checkpoint"])
def test_ctrl_c_waits_for_the_step_writes_a_checkpoint_and_the_rest_ends_with_the_same_bits(
    moment, uninterrupted, tmp_path, monkeypatch
):
    steps, pressed = [], []

    def press(at: int):
        if len(steps) == at and not pressed:
            pressed.append(at)
            os.kill(os.getpid(), signal.SIGINT)

    def source(start):
        for item in batches(start):
            if moment in ("in a batch", "in the loader's processes"):
                press(4)
            if moment == "in the loader's processes" and pressed:
                raise RuntimeError("DataLoader worker (pid 4711) exited unexpectedly")
            yield item

    if moment == "in a step":
        handle = register_optimizer_step_pre_hook(lambda *_: press(4))
    if moment == "in a checkpoint":
        save = Trainer.save
        monkeypatch.setattr(Trainer, "save", lambda *args: (press(3), save(*args)))
    try:
        with pytest.raises(KeyboardInterrupt):
            run(converted(), ALL_ON, source=source, resume_dir=tmp_path, log=lambda _, step: steps.append(step))
    finally:
        if moment == "in a step":
            handle.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopped = 5 if moment in ("in a step", "in a batch") else 4
    assert steps == list(range(1, stopped + 1))
    assert names(tmp_path) == ["step-0000003", f"step-{stopped:07d}"]
    model = converted()
    run(model, ALL_ON, resume_dir=tmp_path, log=lambda _, step: steps.append(step))
    assert steps == list(range(1, STEPS + 1)) and same(state(model), uninterrupted)


def test_a_second_ctrl_c_does_not_wait():
    def source(start):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield from batches(start)

    logged = []
    with pytest.raises(KeyboardInterrupt):
        run(converted(), source=source, log=lambda *_: logged.append(1))
    assert logged == []


def test_ctrl_c_frees_what_was_frozen():
    model = converted()
    with pytest.raises(KeyboardInterrupt):
        run(model, dataclasses.replace(PLAIN, trainable="new"), log=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_whole_checkpoints_are_picked_up(uninterrupted, tmp_path, monkeypatch):
    """A kill, or a full disk, in the midst of a checkpoint leaves the one before."""
    whole, calls = torch.save, []

    def torn(content, file):
        calls.append(file)
        whole(content, file)
        if len(calls) == 2:
            file.write_bytes(file.read_bytes()[:1000])
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(T5Error, match=r"could not be written to .*disk full.*step-0000003 is kept"):
            run(converted(), ALL_ON, resume_dir=tmp_path)
    model, steps = converted(), []
    run(model, ALL_ON, resume_dir=tmp_path, log=lambda _, step: steps.append(step))
    assert steps[0] == 4 and same(state(model), uninterrupted)


def test_a_checkpoint_is_read_without_running_what_it_pickles(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run(converted(), ALL_ON, resume_dir=tmp_path, log=lambda _, step: 1 / (4 - step))
    load, restricted = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda *a, **given: (restricted.append(given.get("weights_only")), load(*a, **given))[1]
    )
    run(converted(), ALL_ON, resume_dir=tmp_path)
    assert set(restricted) == {True}


@pytest.mark.parametrize("kept", [1, 2])
def test_so_many_checkpoints_are_kept_and_nothing_of_runs_that_were_killed(kept, tmp_path, monkeypatch, capsys):
    (tmp_path / ".step-0000001").mkdir()
    monkeypatch.setattr(checkpoints, "LARGE", 1)
    run(converted(), dataclasses.replace(ALL_ON, checkpoint_every=2, checkpoints_kept=kept), resume_dir=tmp_path)
    assert names(tmp_path) == ["step-0000006", "step-0000008"][-kept:]
    told = f"every 2 steps, in {tmp_path}; {kept} kept and one being written take 0.0 GB"
    assert told in capsys.readouterr().out


def test_none_is_written_where_none_is_kept_and_one_that_is_there_serves(tmp_path):
    run(converted(), ALL_ON, resume_dir=tmp_path)
    there = names(tmp_path)
    steps, none = [], dataclasses.replace(ALL_ON, checkpoint_every=2, checkpoints_kept=0)
    run(converted(), none, resume_dir=tmp_path, log=lambda _, step: steps.append(step))
    assert names(tmp_path) == there and not steps
    run(converted(), none, resume_dir=tmp_path / "new")
    assert not names(tmp_path / "new")


@pytest.fixture(scope="module")
def processes():
    """Starts functions of training_job in processes that have torch and timm imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["timm", "t5lib.training.classifier", "t5lib.conversion", "accelerate.checkpointing"]
    )
    started = []

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def wait_until(holds, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.mark.xdist_group("processes")
def test_killed_and_started_again_it_ends_with_the_same_bits_as_an_uninterrupted_run(
    processes, uninterrupted, tmp_path
):
    out = tmp_path / "out.safetensors"
    for pause_at in (5, 11):  # before the first checkpoint is there; after it, in the middle of a step
        killed = processes(job, out, tmp_path, pause_at)
        wait_until((tmp_path / "paused").exists)
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        (tmp_path / "paused").unlink()
    assert names(tmp_path) == ["step-0000003"]
    last = processes(job, out, tmp_path)
    last.join(60)
    assert last.exitcode == 0
    assert same(load_file(out), uninterrupted)
