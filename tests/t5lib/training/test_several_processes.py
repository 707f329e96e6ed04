"""One, two or four processes train, align and calibrate alike: whatever their number, the result is the same."""

import numpy as np
import pytest
import shared_work

from t5lib.utils.errors import T5Error

pytestmark = pytest.mark.xdist_group("processes")
NUMBERS = (2, 4)


def assert_same(answers: list, alone: shared_work.Work) -> None:
    """Losses and weights of several processes and of one; only the first logs."""
    for answer in answers:
        assert isinstance(answer, tuple), answer
    (losses, weights), *others = answers
    assert len(losses) == len(alone[0])
    np.testing.assert_allclose(losses, alone[0], rtol=1e-4)
    for name, value in alone[1].items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    for _, theirs in others:
        assert all(np.array_equal(value, theirs[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("work", "changes"),
    [
        ("classify", {}),  # mixup, averaged weights; each batch shared
        ("classify", {"accumulate": 4, "trainable": "lora", "precision": "bf16"}),  # batches in turn
        ("denoise", {"accumulate": 2, "gradient_checkpointing": True}),
        ("align", {}),
        ("align", {"output": 0.0, "accumulate": 2, "trainable": "all"}),
        ("calibrate", {}),
        ("calibrate", {"batch_size": 4, "lr_inherited": 0.0}),
    ],
    ids=str,
)
def test_losses_and_weights_of_one_two_and_four_processes_agree(work, changes, groups):
    function = getattr(shared_work, work)
    alone = function(changes)
    for number in NUMBERS if not changes else NUMBERS[:1]:
        assert_same(groups[number](function, changes), alone)


@pytest.mark.parametrize(
    ("work", "changes"),
    [("denoise", {"ema": 0.9, "accumulate": 3, "gradient_checkpointing": 0.5}), ("align", {})],
    ids=str,
)
def test_fsdp2_holds_weights_gradients_and_averages_in_pieces_and_agrees(work, changes, groups):
    function = getattr(shared_work, work)
    assert_same(groups[2](shared_work.in_pieces, function, changes), function(changes))


def test_pieces_of_four_processes_go_on_in_two(groups, tmp_path):
    answers = groups[4](shared_work.in_pieces, shared_work.classify, {}, tmp_path, 3)
    assert all(isinstance(answer, ZeroDivisionError) for answer in answers), answers
    answers = groups[2](shared_work.in_pieces, shared_work.classify, {}, tmp_path)
    assert isinstance(answers[0], tuple), answers
    losses, weights = shared_work.classify({})
    assert len(answers[0][0]) == 2
    assert_same(answers, (losses[2:], weights))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_dropped_at_random_follows_from_the_batch_and_from_no_process(accumulate, groups):
    """Shared batches, and batches in turn."""
    arguments = {"accumulate": accumulate}, None, 1000, 0.5
    assert_same(groups[2](shared_work.classify, *arguments), shared_work.classify(*arguments))


@pytest.mark.parametrize(("work", "stop", "logged"), [("classify", 3, 2), ("calibrate", 5, 7)])
def test_another_number_of_processes_goes_on_with_the_same_run(work, stop, logged, groups, tmp_path):
    function = getattr(shared_work, work)
    alone = function({})
    for number in (4, 2):
        answers = groups[number](function, {}, tmp_path, stop)
        assert all(isinstance(answer, ZeroDivisionError) for answer in answers), answers
        assert list(tmp_path.glob("step-*"))
    losses, weights = function({}, tmp_path)
    np.testing.assert_allclose(losses, alone[0][-logged:], rtol=1e-4)
    for name, value in alone[1].items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("work", "changes", "message"),
    [
        ("classify", {"batch_size": 6}, "4 processes cannot share batches evenly with batch_size 6 and accumulate 1"),
        ("classify", {"batch_size": 12}, "cannot share batches of 12 in pairs; expected a multiple of 8"),
        ("calibrate", {"batch_size": 6}, "calibrate: batch_size holds 6 samples, which 4 processes cannot share"),
    ],
)
def test_a_batch_that_cannot_be_shared_evenly_is_refused(work, changes, message, groups):
    for error in groups[4](getattr(shared_work, work), changes):
        assert isinstance(error, T5Error) and message in str(error)


def test_all_end_with_what_the_process_finds_whose_loss_is_not_finite(groups):
    for error in groups[2](shared_work.break_down, 1):
        assert isinstance(error, T5Error) and "stopped at step 1: loss nan" in str(error)
        assert "Not finite first in norm" in str(error)
