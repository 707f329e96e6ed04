"""What studies share: jobs in one process or several, where one that fails costs itself alone; seeds, means, words."""

import multiprocessing
import os
import time
from pathlib import Path

import jobs
import pytest
import torch
import yaml

from t5lib.utils.errors import T5Error
from tasks.studies import common

ROOT = Path(__file__).parents[3]


def outcomes(names, at_once, **options):
    return {each.job: each for each in common.run_jobs(jobs.do, names, at_once, **options)}


@pytest.fixture
def quiet(monkeypatch):
    """No process loads torch to count the cards."""
    monkeypatch.setattr(common, "cards", list)


def test_in_this_process_jobs_are_done_in_order_and_a_failure_costs_itself_alone(capfd):
    ended = outcomes(["a", "breaks", "is refused", "b"], at_once=1)
    assert list(ended) == ["a", "breaks", "is refused", "b"]
    assert (ended["a"].result, ended["b"].result, ended["a"].problem) == ("A", "B", None)
    assert ended["is refused"].problem == "too few images"
    assert (
        "Traceback" in ended["breaks"].problem and ended["breaks"].last_words == "ZeroDivisionError: division by zero"
    )
    assert capfd.readouterr().out.splitlines() == ["a at work", "b at work"]


def test_a_process_that_breaks_or_dies_costs_its_own_job_alone(quiet, tmp_path):
    before, names = set(multiprocessing.active_children()), ["dies", "a", "breaks", "is refused", "b"]
    ended = outcomes(names, at_once=2, logs=tmp_path / "logs")
    assert sorted(ended) == sorted(names)
    assert (ended["a"].result, ended["b"].result) == ("A", "B")
    log = tmp_path / "logs/worker-0.log"
    assert ended["dies"].problem == f"its process ended with status 3; see {log}"
    assert (
        "Traceback" in ended["breaks"].problem and ended["breaks"].last_words == "ZeroDivisionError: division by zero"
    )
    assert ended["is refused"].problem == "too few images"
    written = "".join(log.read_text() for log in (tmp_path / "logs").iterdir())
    assert all(words in written for words in ("a at work", "b at work", "division by zero"))
    assert set(multiprocessing.active_children()) <= before


def test_what_cannot_be_sent_to_another_process_is_told_for_its_job(quiet):
    ended = [each.problem for each in common.run_jobs(jobs.do, ["a", lambda: None], 2)]
    assert None in ended and any(problem and "pickle" in problem for problem in ended)


def test_each_process_sees_one_card_and_its_share_of_the_threads(monkeypatch):
    monkeypatch.setattr(common, "cards", lambda: ["2", "5"])
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    views = [each.result for each in common.run_jobs(jobs.surroundings, [1.0] * 3, 3)]
    assert sorted(each["CUDA_VISIBLE_DEVICES"] for each in views) == ["2", "2", "5"]
    assert {each["OMP_NUM_THREADS"] for each in views} == {"4"}
    assert len({each["pid"] for each in views} | {os.getpid()}) == 4
    assert dict(os.environ) == before


def test_all_cards_that_are_seen_are_dealt(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert common.cards() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert common.cards() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    workers = common._workers(2, 2, None)
    assert not any("CUDA_VISIBLE_DEVICES" in worker.environment for worker in workers)  # none is hidden


@pytest.mark.parametrize("at_once", [1, 2])
def test_nothing_is_begun_once_the_time_is_up(quiet, at_once):
    assert not list(common.run_jobs(jobs.do, ["a"], at_once, until=time.time() - 1))
    begun = list(common.run_jobs(jobs.surroundings, [1.5] * 4, at_once, until=time.time() + 0.5))
    assert len(begun) == at_once and not any(each.problem for each in begun)


def test_whoever_stops_early_lets_jobs_save_and_leaves_no_process(quiet, tmp_path):
    before = set(multiprocessing.active_children())
    running = common.run_jobs(jobs.wait_for_interrupt, [tmp_path / "one", tmp_path / "two"], 2)
    with pytest.raises(KeyboardInterrupt):
        common.signal.setitimer(common.signal.ITIMER_REAL, 0.1)
        _interrupt_when_begun(running, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["one.saved", "two.saved"]
    assert set(multiprocessing.active_children()) <= before


def _interrupt_when_begun(running, folder: Path) -> None:
    def ring(*_):
        if len(list(folder.glob("*.begun"))) == 2:
            raise KeyboardInterrupt
        common.signal.setitimer(common.signal.ITIMER_REAL, 0.1)

    before = common.signal.signal(common.signal.SIGALRM, ring)
    try:
        next(running)
    finally:
        common.signal.setitimer(common.signal.ITIMER_REAL, 0)
        common.signal.signal(common.signal.SIGALRM, before)


def test_with_seed_reaches_nested_settings_and_nothing_else():
    settings = {"seed": 7, "freeze": {"train": {"seed": 7, "lr": 1}}, "source": None}
    assert common.with_seed(settings, 3) == {"seed": 3, "freeze": {"train": {"seed": 3, "lr": 1}}, "source": None}


def test_the_order_of_stages_serves_every_stage():
    stages, before = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"], set()
    for name in common.stages_of(ROOT):
        needs = {Path(dep).stem for dep in stages[name]["do"]["deps"] if dep.startswith("data/out/")}
        assert needs <= before
        before.add(name)
    assert common.stages_of(ROOT, "shards") == ["fetch", "shards"]


def test_changes_of_several_options_add_up_and_errors_end_the_program_with_their_words(capsys):
    parser = common.parser("curves", "Curves.\n\nMore.")
    common.add_changes(parser)
    assert parser.parse_args(["--set", "a.b=1", "a.c=2", "--set", "d.e=3"]).set == ["a.b=1", "a.c=2", "d.e=3"]
    with pytest.raises(SystemExit, match="curves: too few images"), common.reported("curves"):
        raise T5Error("too few images")
    with pytest.raises(SystemExit) as stopped, common.reported("curves"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130


def test_a_workspace_has_the_repositorys_images_and_its_own_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "out", "scratch"):
        (tmp_path / "data" / name).mkdir(parents=True)
    root = common.workspace(Path("work"))
    assert [path.name for path in (root / "data").iterdir()] == ["images"] and (root / "data/images").is_symlink()
    assert common.workspace(root) == root
